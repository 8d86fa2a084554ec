/* Prints what the bundle reader makes of the bytes on stdin, one line for each call of its sink, hexadecimal.
 *
 *   bundle-driver STEP: the bytes are fed STEP at a time. */
#undef main /* the supervisor's own is renamed when both are linked */
#include "cloche.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void hex(const char *what, const void *data, size_t n)
{
	const uint8_t *p = data;

	fputs(what, stdout);
	putchar(' ');
	for (size_t i = 0; i < n; i++)
		printf("%02x", p[i]);
	putchar('\n');
}

static int folder(void *self, const char *path)
{
	(void)self;
	hex("folder", path, strlen(path));
	return 0;
}

static int file(void *self, const char *path, bool executable)
{
	(void)self;
	hex(executable ? "program" : "file", path, strlen(path));
	return 0;
}

static int symbolic_link(void *self, const char *target, const char *path)
{
	(void)self;
	hex("target", target, strlen(target));
	hex("link", path, strlen(path));
	return 0;
}

static int input(void *self)
{
	(void)self;
	puts("input");
	return 0;
}

static int bytes(void *self, const uint8_t *data, size_t n)
{
	(void)self;
	hex("bytes", data, n);
	return 0;
}

static int close_file(void *self)
{
	(void)self;
	puts("close");
	return 0;
}

int main(int argc, char **argv)
{
	static const struct bundle_sink sink = {folder, file, symbolic_link, input, bytes, close_file};
	static struct bundle b;
	static uint8_t data[16 * 1024 * 1024];
	size_t n = fread(data, 1, sizeof data, stdin), step = argc > 1 ? (size_t)atol(argv[1]) : 0;

	if (step == 0)
		return 2;
	bundle_init(&b, &sink, NULL);
	for (size_t at = 0; at < n; at += step)
		if (!bundle_feed(&b, data + at, n - at < step ? n - at : step))
			break;
	if (!bundle_finish(&b)) {
		printf("error %s\n", b.error);
		return 0;
	}
	for (char **a = b.plan.argv; *a; a++)
		hex("arg", *a, strlen(*a));
	for (char **e = b.plan.envp; *e; e++)
		hex("env", *e, strlen(*e));
	printf("limits %llu %llu %llu %llu %llu\n", (unsigned long long)b.plan.timeout_ms, (unsigned long long)b.plan.grace_ms,
	       (unsigned long long)b.plan.output_bytes, (unsigned long long)b.plan.artifact_bytes,
	       (unsigned long long)b.plan.artifact_count);
	return 0;
}
