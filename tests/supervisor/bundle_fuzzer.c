/* libFuzzer's target for the bundle reader. The sink writes nothing and holds the reader to its word: no path leaves the
 * workspace, nothing is created after a link, bytes go only where something is open, and how the input is cut makes no
 * difference. */
#include "cloche.h"

#include <stdlib.h>
#include <string.h>

struct watched {
	bool open, links;
	uint64_t calls; /* a hash of all of them */
};

static void must(bool held)
{
	if (!held)
		abort();
}

static void note(struct watched *w, const void *data, size_t n)
{
	const uint8_t *p = data;

	for (size_t i = 0; i < n; i++)
		w->calls = (w->calls ^ p[i]) * 0x100000001b3u;
	w->calls = (w->calls ^ 0x1ff) * 0x100000001b3u;
}

static void path_is_inside(const char *path)
{
	must(strlen(path) <= 4000 && path[0] != '/');
	for (const char *p = path;; p++) {
		size_t n = strcspn(p, "/");

		must(n > 0 && n <= 255);
		must(!(n == 1 && p[0] == '.') && !(n == 2 && p[0] == '.' && p[1] == '.'));
		p += n;
		if (!*p)
			return;
	}
}

static int folder(void *self, const char *path)
{
	struct watched *w = self;

	must(!w->open && !w->links);
	path_is_inside(path);
	note(w, path, strlen(path));
	return strlen(path) % 97 == 96; /* sinks fail too */
}

static int file(void *self, const char *path, bool executable)
{
	struct watched *w = self;

	folder(self, path);
	note(w, &executable, sizeof executable);
	w->open = true;
	return 0;
}

static int symbolic_link(void *self, const char *target, const char *path)
{
	struct watched *w = self;
	long depth = 0;

	must(!w->open);
	path_is_inside(path);
	must(target[0] != 0 && target[0] != '/');
	for (const char *p = path; *p; p++)
		depth += *p == '/';
	/* The target with its link's folder, part by part: never above the workspace. */
	for (const char *p = target; *p; p += *p == '/') {
		size_t n = strcspn(p, "/");

		depth += n == 2 && p[0] == '.' && p[1] == '.' ? -1 : n > 0 && !(n == 1 && p[0] == '.');
		must(depth >= 0);
		p += n;
	}
	w->links = true;
	note(w, target, strlen(target));
	note(w, path, strlen(path));
	return 0;
}

static int input(void *self)
{
	struct watched *w = self;

	must(!w->open);
	w->open = true;
	note(w, "I", 1);
	return 0;
}

static int bytes(void *self, const uint8_t *data, size_t n)
{
	struct watched *w = self;

	must(w->open && n <= BUNDLE_RECORD_MAX);
	note(w, data, n);
	return 0;
}

static int close_file(void *self)
{
	struct watched *w = self;

	must(w->open);
	w->open = false;
	return 0;
}

static const struct bundle_sink sink = {folder, file, symbolic_link, input, bytes, close_file};

static bool read_all(struct bundle *b, struct watched *w, const uint8_t *data, size_t n, size_t step)
{
	*w = (struct watched){0};
	bundle_init(b, &sink, w);
	for (size_t at = 0; at < n; at += step)
		if (!bundle_feed(b, data + at, n - at < step ? n - at : step))
			break;
	bool ok = bundle_finish(b);

	must(ok == (b->error == NULL));
	if (ok) {
		must(!w->open && b->done && b->plan.timeout_ms > 0 && b->plan.argv[0] && !b->plan.argv[b->n_args]);
		must(!b->plan.envp[b->n_env]);
		for (size_t i = 0; i < b->n_env; i++)
			must(strchr(b->plan.envp[i], '=') > b->plan.envp[i]);
	}
	return ok;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	static struct bundle whole, cut;
	struct watched of_whole, of_cut;

	bool ok = read_all(&whole, &of_whole, data, n, n ? n : 1);

	must(read_all(&cut, &of_cut, data, n, 1 + (n > 0 ? data[n - 1] % 11 : 0)) == ok);
	must(of_whole.calls == of_cut.calls && of_whole.open == of_cut.open);
	must(ok || (whole.error == cut.error && whole.sink_errno == cut.sink_errno));
	return 0;
}
