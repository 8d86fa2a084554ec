/* The process that holds a pod's namespaces: it sleeps, and ends when told to.
 *
 * As the first process of a process namespace it gets no signal that it has no handler for. */

#include <signal.h>
#include <unistd.h>

static void end(int number)
{
    (void)number;
    _exit(0);
}

int main(void)
{
    signal(SIGINT, end);
    signal(SIGTERM, end);
    /* A pod may share one process namespace: orphans then become this process's children. */
    signal(SIGCHLD, SIG_IGN);
    for (;;)
        pause();
}
