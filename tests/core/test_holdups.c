/* The measure under which all tests here run. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "holdups.h"
#include "net.h"

static void compute(uint64_t ns)
{
    for (uint64_t begun_ns = cpu_ns(); cpu_ns() - begun_ns < ns;)
        continue;
}

TEST(calls_of_the_core_are_measured)
{
    int error;
    CHECK(!holdups_take().function);
    struct aiokvm_net *net = aiokvm_net_new(NULL, &error);
    struct holdup holdup = holdups_take();
    CHECK(holdup.function && !strcmp(holdup.function, "aiokvm_net_new"));
    CHECK(holdup.cpu_ns > 0 && holdup.cpu_ns < HOLDUPS_LIMIT_NS);
    CHECK(!holdups_take().function);
    aiokvm_net_free(net);
    CHECK(!strcmp(holdups_take().function, "aiokvm_net_free"));
}

TEST(calls_of_a_step_add_up)
{
    int error;
    struct aiokvm_net *net = aiokvm_net_new(NULL, &error);
    holdups_take();
    HOLDUPS_STEP({
        aiokvm_net_serve(net, 0);
        compute(2000000);
        aiokvm_net_serve(net, 0);
    });
    struct holdup holdup = holdups_take();
    CHECK(!strcmp(holdup.function, "a step"));
    CHECK(holdup.cpu_ns >= 2000000);
    aiokvm_net_free(net);
}

static void *call(void *argument)
{
    (void)argument;
    int error;
    aiokvm_net_free(aiokvm_net_new(NULL, &error));
    return NULL;
}

TEST(a_thread_that_is_not_the_loops_may_take_its_time)
{
    pthread_t thread;
    holdups_take();
    CHECK_EQ(pthread_create(&thread, NULL, call, NULL), 0);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK(!holdups_take().function);
}

/* In a process of its own, which fails as a test does; nobody reads what it says. */
static int status_of(uint64_t ns)
{
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        close(STDOUT_FILENO);
        HOLDUPS_STEP(compute(ns));
        _exit(0);
    }
    int status;
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK(WIFEXITED(status));
    return WEXITSTATUS(status);
}

TEST(a_test_that_holds_its_thread_fails)
{
    CHECK_EQ(status_of(HOLDUPS_LIMIT_NS / 10), 0);
    CHECK_EQ(status_of(HOLDUPS_LIMIT_NS), 1);
}
