# cython: language_level=3
"""A SIGBUS handler for mapped files that shrink while they are read.

Knows: ranges of addresses. Does not know: files. ``file_guard`` is its only user and says what it is for.

The kernel sends SIGBUS for a mapped page that its file does not have any more, or that the disk cannot give. The
handler puts pages of zeros in the place of the rest of that mapping, notes where, and lets the process go on; what was
read is worthless from then on, and ``first_lost`` says so. A SIGBUS anywhere else goes to whoever was asked before.
The handler calls nothing but mmap, sigaction and raise, and changes nothing but its own table. The table is changed
with the GIL held.
"""

from libc.stdint cimport uintptr_t

cdef extern from *:
    """
    #include <errno.h>
    #include <signal.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <unistd.h>

    #define COREHEAP_GUARDS 4096
    #define COREHEAP_NOTHING_LOST UINTPTR_MAX

    static struct {
        volatile uintptr_t start;
        volatile uintptr_t end; /* 0 in a free row; written last, and first set to 0 */
        volatile uintptr_t lost; /* the lowest address that zeros were put at */
    } coreheap_guards[COREHEAP_GUARDS];
    static volatile int coreheap_guard_rows = 0;
    static int coreheap_guard_count = 0;
    static struct sigaction coreheap_earlier_action;
    static volatile int coreheap_passed_on = 0;
    static uintptr_t coreheap_page_mask;

    static void coreheap_on_bus_error(int number, siginfo_t *information, void *context) {
        int kept_errno = errno;
        uintptr_t place = (uintptr_t) information->si_addr;
        int row, rows = coreheap_guard_rows;
        (void) context;
        /* si_code is positive for what the kernel found by itself: then there is an address. */
        for (row = 0; information->si_code > 0 && row < rows; row++) {
            uintptr_t end = coreheap_guards[row].end, page = place & coreheap_page_mask;
            if (end == 0 || place < coreheap_guards[row].start || place >= end) {
                continue;
            }
            const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
            if (mmap((void *) page, end - page, PROT_READ, flags, -1, 0) == MAP_FAILED) {
                break;
            }
            if (page < coreheap_guards[row].lost) {
                coreheap_guards[row].lost = page;
            }
            errno = kept_errno;
            return;
        }
        /* Not ours: the instruction runs again under the earlier action; a signal that was sent is sent again. An
           earlier handler that gives it back to us in turn gets the end of the process. */
        if (coreheap_passed_on++) {
            signal(SIGBUS, SIG_DFL);
        } else {
            sigaction(SIGBUS, &coreheap_earlier_action, NULL);
        }
        if (information->si_code <= 0) {
            raise(number);
        }
        errno = kept_errno;
    }

    static int coreheap_is_asked(void) {
        struct sigaction now;
        return sigaction(SIGBUS, NULL, &now) == 0 && (now.sa_flags & SA_SIGINFO)
            && now.sa_sigaction == coreheap_on_bus_error;
    }

    static int coreheap_guard(uintptr_t start, uintptr_t byte_count) {
        int row;
        struct sigaction action;
        coreheap_page_mask = ~((uintptr_t) sysconf(_SC_PAGESIZE) - 1);
        for (row = 0; row < COREHEAP_GUARDS && coreheap_guards[row].end != 0; row++) {
        }
        if (row == COREHEAP_GUARDS || byte_count == 0) {
            return -1;
        }
        /* Somebody may have set another action since the last file was opened. */
        if (!coreheap_is_asked()) {
            coreheap_passed_on = 0;
            memset(&action, 0, sizeof action);
            action.sa_sigaction = coreheap_on_bus_error;
            action.sa_flags = SA_SIGINFO | SA_ONSTACK;
            sigemptyset(&action.sa_mask);
            if (sigaction(SIGBUS, &action, &coreheap_earlier_action) != 0) {
                return -1;
            }
        }
        coreheap_guard_count++;
        coreheap_guards[row].start = start;
        coreheap_guards[row].lost = COREHEAP_NOTHING_LOST;
        coreheap_guards[row].end = (start + byte_count + ~coreheap_page_mask) & coreheap_page_mask;
        if (row >= coreheap_guard_rows) {
            coreheap_guard_rows = row + 1;
        }
        return row;
    }

    static void coreheap_release(int row) {
        if (row < 0 || row >= COREHEAP_GUARDS || coreheap_guards[row].end == 0) {
            return;
        }
        coreheap_guards[row].end = 0;
        if (--coreheap_guard_count == 0 && coreheap_is_asked()) {
            sigaction(SIGBUS, &coreheap_earlier_action, NULL);
        }
    }

    static uintptr_t coreheap_lost(int row) { return coreheap_guards[row].lost; }
    static uintptr_t coreheap_start(int row) { return coreheap_guards[row].start; }
    """
    int COREHEAP_GUARDS
    uintptr_t COREHEAP_NOTHING_LOST
    int coreheap_guard(uintptr_t start, uintptr_t byte_count)
    void coreheap_release(int row)
    uintptr_t coreheap_lost(int row)
    uintptr_t coreheap_start(int row)


def guard(const unsigned char[::1] mapping not None):
    """Guard the pages of a mapping until ``release``; its row, or None when the table is full or there is no page."""
    if mapping.shape[0] == 0:
        return None
    cdef int row = coreheap_guard(<uintptr_t>&mapping[0], <uintptr_t>mapping.shape[0])
    return None if row < 0 else row


def release(int row):
    """Let go of a row; the pages may be unmapped then."""
    coreheap_release(row)


def first_lost(int row):
    """Offset in the mapping of the first byte that became zero; None where none did."""
    if not 0 <= row < COREHEAP_GUARDS:
        raise IndexError(row)
    cdef uintptr_t lost = coreheap_lost(row)
    return None if lost == COREHEAP_NOTHING_LOST else lost - coreheap_start(row)
