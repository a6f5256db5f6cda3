/* Runs a program that ends with the process that started it, however that one ends:
 *
 *     keeper PARENT GRACE_MS PROGRAM [ARGUMENT]...
 *
 * When PARENT is gone, or at SIGTERM, SIGINT or SIGHUP, the program's process group gets SIGTERM, and GRACE_MS later,
 * with 0 at once, SIGKILL. The keeper ends as the program does, with its status or by its signal, and takes what is left
 * of the group along.
 *
 * PR_SET_PDEATHSIG alone is about the thread that forked, which in an asynchronous program may end long before its
 * process: so a pidfd watches the parent. The keeper has one thread; what it starts may well use that signal.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* As the shell has them. */
enum { STATUS_FAILED = 125, STATUS_NOT_STARTED = 127 };

static int complain(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    return STATUS_FAILED;
}

static long long now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

static void run(char **argv, pid_t keeper, const sigset_t *mask)
{
    setsid();
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != keeper)
        _exit(STATUS_NOT_STARTED);
    sigprocmask(SIG_SETMASK, mask, NULL);
    execvp(argv[0], argv);
    complain(argv[0]);
    _exit(STATUS_NOT_STARTED);
}

/* The keeper must not hold a pipe open that the program has closed, nor a socket. */
static void let_go(int first, int second)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int fd = 0; fd <= 2 && null >= 0; fd++)
        dup2(null, fd);
    int low = first < second ? first : second, high = first < second ? second : first;
    if (low > 3)
        syscall(SYS_close_range, 3, low - 1, 0);
    if (high > low + 1)
        syscall(SYS_close_range, low + 1, high - 1, 0);
    syscall(SYS_close_range, high + 1, ~0U, 0);
}

/* Ends as a program did whose status this is. */
static int end_like(int status)
{
    if (WIFEXITED(status))
        return WEXITSTATUS(status);
    int number = WTERMSIG(status);
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
    signal(number, SIG_DFL);
    sigset_t only;
    sigemptyset(&only);
    sigaddset(&only, number);
    raise(number);
    sigprocmask(SIG_UNBLOCK, &only, NULL);
    return 128 + number;
}

/* Waits for the program, ending its group when it is to end; returns its status as waitpid() has it. */
static int keep(pid_t program, int parent, int signals, int grace_ms)
{
    long long deadline = -1;
    for (;;) {
        bool ending = deadline >= 0;
        int timeout = -1;
        if (ending) {
            long long left = deadline - now_ms();
            timeout = left > 0 ? (int)left : 0;
        }
        struct pollfd watched[] = {{.fd = signals, .events = POLLIN}, {.fd = ending ? -1 : parent, .events = POLLIN}};
        int ready = poll(watched, 2, timeout);
        bool asked = ready > 0 && watched[1].revents;
        if (ready > 0 && watched[0].revents) {
            struct signalfd_siginfo info;
            if (read(signals, &info, sizeof(info)) == sizeof(info) && info.ssi_signo != SIGCHLD)
                asked = true;
            siginfo_t ended = {0};
            /* Not reaped yet: until then the group's number is nobody else's. */
            if (waitid(P_PID, (id_t)program, &ended, WEXITED | WNOHANG | WNOWAIT) == 0 && ended.si_pid == program)
                break;
        }
        if (asked && !ending) {
            deadline = now_ms() + grace_ms;
            if (grace_ms && kill(-program, SIGTERM) < 0)
                kill(program, SIGTERM); /* it has no group of its own yet */
        }
        if (deadline >= 0 && now_ms() >= deadline) {
            kill(-program, SIGKILL);
            kill(program, SIGKILL); /* it has no group of its own yet */
            deadline = now_ms() + 1000;
        }
    }
    kill(-program, SIGKILL);
    int status = 0;
    while (waitpid(program, &status, 0) < 0 && errno == EINTR)
        ;
    return status;
}

int main(int argc, char **argv)
{
    if (argc < 4)
        return STATUS_FAILED;
    pid_t parent_pid = atoi(argv[1]);
    int grace_ms = atoi(argv[2]);
    int parent = (int)syscall(SYS_pidfd_open, parent_pid, 0);
    if (parent < 0 && errno != ESRCH)
        return complain("pidfd_open");
    if (parent < 0 || getppid() != parent_pid)
        return STATUS_NOT_STARTED;
    sigset_t heard, mask;
    sigemptyset(&heard);
    int numbers[] = {SIGTERM, SIGINT, SIGHUP, SIGCHLD};
    for (size_t i = 0; i < sizeof(numbers) / sizeof(*numbers); i++)
        sigaddset(&heard, numbers[i]);
    signal(SIGCHLD, SIG_DFL);
    sigprocmask(SIG_BLOCK, &heard, &mask);
    int signals = signalfd(-1, &heard, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals < 0)
        return complain("signalfd");
    fcntl(parent, F_SETFD, FD_CLOEXEC);
    pid_t keeper = getpid(), program = fork();
    if (program < 0)
        return complain("fork");
    if (!program)
        run(argv + 3, keeper, &mask);
    let_go(parent, signals);
    return end_like(keep(program, parent, signals, grace_ms));
}
