/* A race, for two threads: see tests/tsan.py. */

static int bumped;

/* NOLINTBEGIN(misc-use-internal-linkage): for ctypes. */
void
bump(void);
/* NOLINTEND(misc-use-internal-linkage) */

void
bump(void)
{
    for (int i = 0; i < 20000000; i++) {
        bumped++;
    }
}
