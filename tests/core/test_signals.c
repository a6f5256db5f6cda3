/* vcpu.c: which signal is the kick. The choice is made once in a process: each test is a process. */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest.h"

static _Atomic int host_handler_calls;

static void host_handler(int number)
{
    (void)number;
    atomic_fetch_add(&host_handler_calls, 1);
}

static void occupy(int number)
{
    struct sigaction action = { .sa_handler = host_handler };
    CHECK_EQ(sigaction(number, &action, NULL), 0);
}

static bool is_default(int number)
{
    struct sigaction action;
    CHECK_EQ(sigaction(number, NULL, &action), 0);
    return action.sa_handler == SIG_DFL;
}

static int in_child(void (*call)(void))
{
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child) {
        call();
        _exit(0);
    }
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    return status;
}

static void pause_works(void)
{
    static const struct fake_step spins[] = { { .op = FAKE_SPIN } };
    struct guest guest = guest_open(spins, 1);
    CHECK_SOON(atomic_load(&guest.fake->entries) == 1);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_PARKED);
    guest_close(&guest);
}

static void takes_the_last(void)
{
    pause_works();
    CHECK(!is_default(SIGRTMAX));
    for (int number = SIGRTMIN; number < SIGRTMAX; number++)
        CHECK(is_default(number));
}

TEST(kick_is_the_last_real_time_signal)
{
    CHECK_EQ(in_child(takes_the_last), 0);
}

static void leaves_others_alone(void)
{
    occupy(SIGRTMAX);
    signal(SIGRTMAX - 1, SIG_IGN);
    pause_works();
    CHECK(!is_default(SIGRTMAX - 2));
    CHECK_EQ(atomic_load(&host_handler_calls), 0);
    struct sigaction action;
    sigaction(SIGRTMAX, NULL, &action);
    CHECK(action.sa_handler == host_handler);
    sigaction(SIGRTMAX - 1, NULL, &action);
    CHECK(action.sa_handler == SIG_IGN);
}

TEST(kick_leaves_the_hosts_signals_alone)
{
    CHECK_EQ(in_child(leaves_others_alone), 0);
}

static void refuses_without_a_signal(void)
{
    for (int number = SIGRTMIN; number <= SIGRTMAX; number++)
        occupy(number);
    struct guest guest = guest_new(NULL, 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), -EBUSY);
    CHECK_EQ(aiokvm_vcpu_tid(guest.vcpu), 0);
    CHECK_EQ(aiokvm_vcpu_start(guest.vcpu), -EBUSY);
    guest_close(&guest);
}

TEST(start_refuses_when_no_signal_is_left)
{
    CHECK_EQ(in_child(refuses_without_a_signal), 0);
}

static void process_signals_pass_by(void)
{
    /* Blocked here: the vCPU's thread would have to take it, if it listened. */
    sigset_t usr1;
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    occupy(SIGUSR1);
    struct guest guest = guest_open(NULL, 0);
    sigprocmask(SIG_BLOCK, &usr1, NULL);
    CHECK_SOON(atomic_load(&guest.fake->asleep) == 1);
    kill(getpid(), SIGUSR1);
    CHECK_EQ(aiokvm_vcpu_pause(guest.vcpu), 0);
    guest_tells(&guest, AIOKVM_VCPU_PARKED);
    CHECK_EQ(atomic_load(&host_handler_calls), 0);
    guest_close(&guest);
}

TEST(vcpu_threads_take_no_signal_of_the_process)
{
    CHECK_EQ(in_child(process_signals_pass_by), 0);
}
