"""What happened to a damaged heap: foreign bytes, their culprits, repairs."""
