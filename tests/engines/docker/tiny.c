/* An interpreter for an image that has nothing else: `tiny SCRIPT ARG...` shows what it was given.
 *
 * The script's content goes to stdout, the number of arguments to stderr, standard input, if there is any, to
 * /output/stdin, and the first ARG is the exit code. */

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { FAILED = 125 };

static int fail(const char *what)
{
    fprintf(stderr, "tiny: %s: %s\n", what, strerror(errno));
    return FAILED;
}

/* Copies until the end of input; the file TO is made when the first byte comes. 0, or -1 and errno. */
static int copy(int from, int to, const char *name)
{
    char buffer[65536];
    for (;;) {
        ssize_t got = read(from, buffer, sizeof buffer);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return (int)got;
        if (to < 0 && (to = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0666)) < 0)
            return -1;
        for (ssize_t done = 0, put; done < got; done += put) {
            put = write(to, buffer + done, (size_t)(got - done));
            if (put < 0 && errno == EINTR)
                put = 0;
            if (put < 0)
                return -1;
        }
    }
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fputs("usage: tiny SCRIPT ARG...\n", stderr);
        return FAILED;
    }
    int script = open(argv[1], O_RDONLY);
    if (script < 0)
        return fail(argv[1]);
    if (copy(script, STDOUT_FILENO, "stdout") < 0)
        return fail("stdout");
    fprintf(stderr, "tiny: %d args\n", argc - 2);
    /* A closed standard input is none. */
    if (copy(STDIN_FILENO, -1, "/output/stdin") < 0 && errno != EBADF)
        return fail("/output/stdin");
    return argc > 2 ? atoi(argv[2]) : 0;
}
