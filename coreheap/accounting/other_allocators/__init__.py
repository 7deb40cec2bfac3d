"""Allocators beside glibc's: `other_allocators` says which there are and why, `other_allocator_claims` claims their memory."""

from coreheap.accounting.other_allocators.found import OtherAllocator as OtherAllocator
from coreheap.accounting.other_allocators.found import Ranges as Ranges
from coreheap.accounting.other_allocators.recognise import other_allocator_claims as other_allocator_claims
from coreheap.accounting.other_allocators.recognise import other_allocators as other_allocators
