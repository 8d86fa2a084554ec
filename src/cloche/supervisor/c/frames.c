/* The frame writer. What frames are stands in frames.py. Writing never blocks: what the reader does not take waits in a
 * buffer, and whoever has more to say looks at frames_room() first. */
#include "cloche.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static struct {
	int fd;
	bool gone;
	uint64_t seq;
	size_t start, end;
	char buffer[64 * LINE_MAX_BYTES];
} out;

void frames_init(int fd)
{
	out.fd = fd;
}

int frames_fd(void)
{
	return out.fd;
}

bool frames_pending(void)
{
	return out.end > out.start && !out.gone;
}

bool frames_room(void)
{
	return out.gone || sizeof out.buffer - (out.end - out.start) >= (size_t)4 * LINE_MAX_BYTES;
}

bool frames_gone(void)
{
	return out.gone;
}

void frames_push(void)
{
	while (frames_pending()) {
		ssize_t n = write(out.fd, out.buffer + out.start, out.end - out.start);

		if (n > 0) {
			out.start += (size_t)n;
		} else if (n < 0 && errno == EAGAIN) {
			return;
		} else if (n < 0 && errno != EINTR) {
			out.gone = true;
		}
	}
	out.start = out.end = 0;
}

bool frames_flush(uint64_t ms)
{
	uint64_t end = now_ms() + ms;

	for (frames_push(); frames_pending(); frames_push()) {
		struct pollfd p = {.fd = out.fd, .events = POLLOUT};
		uint64_t now = now_ms();

		if (now >= end)
			return false;
		poll(&p, 1, (int)(end - now < 1000 ? end - now : 1000));
		if (p.revents & POLLERR)
			out.gone = true;
	}
	return !out.gone;
}

static size_t base64(char *to, const uint8_t *data, size_t n)
{
	static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	char *start = to;

	for (; n >= 3; n -= 3, data += 3) {
		uint32_t v = (uint32_t)data[0] << 16 | (uint32_t)data[1] << 8 | data[2];

		*to++ = digits[v >> 18];
		*to++ = digits[v >> 12 & 63];
		*to++ = digits[v >> 6 & 63];
		*to++ = digits[v & 63];
	}
	if (n > 0) {
		uint32_t v = (uint32_t)data[0] << 16 | (n == 2 ? (uint32_t)data[1] << 8 : 0);

		*to++ = digits[v >> 18];
		*to++ = digits[v >> 12 & 63];
		*to++ = n == 2 ? digits[v >> 6 & 63] : '=';
		*to++ = '=';
	}
	return (size_t)(to - start);
}

/* Appends one line: the number, the formatted fields, then the payload if there is one. */
static void line(const uint8_t *payload, size_t n, const char *format, ...) __attribute__((format(printf, 3, 4)));
static void line(const uint8_t *payload, size_t n, const char *format, ...)
{
	va_list args;
	size_t len;

	if (sizeof out.buffer - (out.end - out.start) < LINE_MAX_BYTES)
		frames_flush(30000);
	if (out.gone)
		return;
	if (sizeof out.buffer - out.end < LINE_MAX_BYTES) {
		memmove(out.buffer, out.buffer + out.start, out.end - out.start);
		out.end -= out.start;
		out.start = 0;
	}
	if (sizeof out.buffer - out.end < LINE_MAX_BYTES) {
		out.gone = true; /* the reader took nothing for half a minute */
		return;
	}
	char *to = out.buffer + out.end;

	len = (size_t)sprintf(to, "@c %llu ", (unsigned long long)out.seq++);
	va_start(args, format);
	len += (size_t)vsprintf(to + len, format, args);
	va_end(args);
	if (n > 0) {
		to[len++] = ' ';
		len += base64(to + len, payload, n);
	}
	to[len++] = '\n';
	out.end += len;
}

void frame_hello(void)
{
	line(NULL, 0, "hello %d %ld %ld", FRAME_VERSION, (long)getpid(), (long)getuid());
}

void frame_start(void)
{
	line(NULL, 0, "start");
}

void frame_output(char kind, uint64_t offset, const uint8_t *data, size_t n)
{
	line(data, n, "%c %llu", kind, (unsigned long long)offset);
}

void frame_file(uint64_t size, bool truncated, const char *path)
{
	line((const uint8_t *)path, strlen(path), "file %llu %d", (unsigned long long)size, truncated);
}

void frame_data(const uint8_t *data, size_t n)
{
	line(data, n, "data");
}

void frame_fail(const char *code, const char *format, ...)
{
	char message[1024];
	va_list args;

	va_start(args, format);
	int n = vsnprintf(message, sizeof message, format, args);

	va_end(args);
	if (n >= (int)sizeof message)
		n = (int)sizeof message - 1;
	line((const uint8_t *)message, (size_t)n, "fail %s", code);
	frames_flush(30000);
}

void frame_end(const struct ending *e)
{
	bool exited = WIFEXITED(e->status);

	line(NULL, 0, "end %s %d %s %llu %llu %llu %llu %llu %llu %d %d %llu %u", exited ? "exit" : "signal",
	     exited ? WEXITSTATUS(e->status) : WTERMSIG(e->status), e->cause, (unsigned long long)e->run_us,
	     (unsigned long long)e->cpu_us, (unsigned long long)e->peak_bytes, (unsigned long long)e->oom_kills,
	     (unsigned long long)e->bytes[0], (unsigned long long)e->bytes[1], e->truncated[0], e->truncated[1],
	     (unsigned long long)e->skipped, e->hardening);
}
