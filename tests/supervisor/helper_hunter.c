/* A script's attack on the helper that is to kill it: stops or kills every process that appears beside its own, as fast as the
 * machine allows. Ends by itself after a while. */
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define HUNTERS 4
#define LIFE_S 20

static pid_t newest(void)
{
	char text[128] = {0};
	int fd = open("/proc/loadavg", O_RDONLY);
	ssize_t n = read(fd, text, sizeof text - 1);
	char *last = strrchr(text, ' ');

	close(fd);
	return n > 0 && last ? (pid_t)atol(last) : 0;
}

int main(void)
{
	pid_t own[HUNTERS];
	int sig = SIGKILL;

	signal(SIGTERM, SIG_IGN);
	own[0] = getpid();
	for (int i = 1; i < HUNTERS; i++) {
		own[i] = fork();
		if (own[i] == 0) {
			setsid();
			sig = i % 2 ? SIGSTOP : SIGKILL;
			break;
		}
	}
	time_t end = time(NULL) + LIFE_S;

	puts("hunting");
	fflush(stdout);
	for (unsigned round = 0; time(NULL) < end; round++) {
		static pid_t from;

		if (round % 8 == 0)
			from = newest();
		for (pid_t pid = from; pid < from + 6; pid++) {
			bool mine = pid == getpid();

			for (int i = 0; i < HUNTERS; i++)
				mine |= pid == own[i];
			if (!mine && pid > own[0] + HUNTERS)
				kill(pid, sig);
		}
	}
	return 0;
}
