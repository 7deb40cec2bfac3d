"""What malloc holds free, page by page, what keeps it from going back, and what malloc_trim would return."""

from coreheap.retention.survey import survey_free_memory as survey_free_memory
