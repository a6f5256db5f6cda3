#include "check.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "holdups.h"

static struct test *first, **last = &first;
static struct test *current;
static int number;
static const char *skipped;

void test_register(struct test *test)
{
    *last = test;
    last = &test->next;
}

void check_failed(const char *file, int line, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("not ok %d - %s\n# %s:%d: ", number, current->name, file, line);
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    fflush(stdout);
    /* Other threads may be in the middle of anything: no destructors, no leak check. */
    _exit(1);
}

void holdups_over(struct holdup holdup)
{
    check_failed(__FILE__, __LINE__, "%s held its thread for %.1f ms of CPU time", holdup.function,
                 (double)holdup.cpu_ns / 1e6);
}

void check_skip(const char *reason)
{
    skipped = reason;
}

static bool is_selected(const struct test *test, char **names)
{
    if (!*names)
        return true;
    while (*names && strcmp(*names, test->name) != 0)
        names++;
    return *names;
}

/* Arguments: the names of the tests to run; without any, all. */
int main(int argc, char **argv)
{
    (void)argc;
    int count = 0;
    for (struct test *test = first; test; test = test->next)
        count += is_selected(test, argv + 1);
    printf("1..%d\n", count);
    fflush(stdout); /* or a child that a test forks may print it again */
    for (current = first; current; current = current->next) {
        if (!is_selected(current, argv + 1))
            continue;
        number++;
        skipped = NULL;
        holdups_take();
        current->run();
        struct holdup worst = holdups_take();
        if (worst.function)
            printf("# held up: %.3f ms in %s, %s\n", (double)worst.cpu_ns / 1e6, worst.function, current->name);
        printf("ok %d - %s%s%s\n", number, current->name, skipped ? " # SKIP " : "", skipped ? skipped : "");
        fflush(stdout);
    }
    return 0;
}
