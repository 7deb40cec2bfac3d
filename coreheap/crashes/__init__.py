"""How a process ended: the fault and what lies there, the last words, the backtrace, a signature."""
