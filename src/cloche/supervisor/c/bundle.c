/* The bundle reader: bytes in, plan and calls of a sink out. No I/O of its own, so that it can be fuzzed alone.
 * The format stands in bundle.py. The writer is trusted by nobody: every bound and every path is checked here. */
#include "cloche.h"

#include <string.h>

static const char magic[] = "cloche-bundle 1";

void bundle_init(struct bundle *b, const struct bundle_sink *sink, void *self)
{
	memset(b, 0, offsetof(struct bundle, record));
	b->sink = sink;
	b->self = self;
}

static bool bad(struct bundle *b, const char *why)
{
	b->error = why;
	return false;
}

static bool took(struct bundle *b, int error, const char *why)
{
	if (error == 0)
		return true;
	b->sink_errno = error;
	return bad(b, why);
}

/* A path of the workspace: relative, no empty, "." or ".." part. */
static bool path_ok(const char *path, size_t n)
{
	if (n == 0 || n > 4000 || memchr(path, 0, n) != NULL)
		return false;
	for (size_t start = 0; start <= n;) {
		const char *slash = memchr(path + start, '/', n - start);
		size_t len = slash ? (size_t)(slash - path) - start : n - start;

		if (len == 0 || len > 255 || (len == 1 && path[start] == '.') ||
		    (len == 2 && path[start] == '.' && path[start + 1] == '.'))
			return false;
		start += len + 1;
	}
	return true;
}

/* A link's target: relative, and never above the workspace when read from the link's folder, word by word. */
static bool target_ok(const char *target, const char *path)
{
	long depth = 0;

	if (target[0] == '\0' || target[0] == '/')
		return false;
	for (const char *p = path; *p; p++)
		depth += *p == '/';
	for (const char *p = target; *p;) {
		size_t len = strcspn(p, "/");

		if (len == 2 && p[0] == '.' && p[1] == '.')
			depth--;
		else if (len > 0 && !(len == 1 && p[0] == '.'))
			depth++;
		if (depth < 0)
			return false;
		p += len + (p[len] == '/');
	}
	return true;
}

static bool keep_string(struct bundle *b, char **list, size_t *n, const char *text, size_t len)
{
	if (*n == BUNDLE_STRINGS || len + 1 > BUNDLE_ARENA - b->arena_len)
		return bad(b, "too many arguments or too large an environment");
	if (memchr(text, 0, len) != NULL)
		return bad(b, "a NUL in an argument or in the environment");
	list[(*n)++] = memcpy(b->arena + b->arena_len, text, len + 1);
	list[*n] = NULL;
	b->arena_len += len + 1;
	return true;
}

static bool limit(struct bundle *b, const char *text)
{
	static const struct {
		const char *name;
		size_t at;
	} names[] = {
		{"timeout_ms", offsetof(struct plan, timeout_ms)},
		{"grace_ms", offsetof(struct plan, grace_ms)},
		{"output_bytes", offsetof(struct plan, output_bytes)},
		{"artifact_bytes", offsetof(struct plan, artifact_bytes)},
		{"artifact_count", offsetof(struct plan, artifact_count)},
	};
	const char *equals = strchr(text, '=');
	uint64_t value;

	if (!equals || !parse_u64(equals + 1, &value) || value > (uint64_t)1 << 40)
		return bad(b, "a malformed limit");
	for (size_t i = 0; i < sizeof names / sizeof *names; i++)
		if (strlen(names[i].name) == (size_t)(equals - text) &&
		    strncmp(names[i].name, text, (size_t)(equals - text)) == 0) {
			memcpy((char *)&b->plan + names[i].at, &value, sizeof value);
			return true;
		}
	return bad(b, "an unknown limit");
}

static bool close_open(struct bundle *b)
{
	if (!b->open)
		return true;
	b->open = false;
	return took(b, b->sink->close(b->self), "write");
}

/* One whole record; its payload is followed by a NUL. */
static bool record(struct bundle *b, char kind, const uint8_t *payload, size_t n)
{
	const struct bundle_sink *s = b->sink;
	const char *text = (const char *)payload;

	if (b->done)
		return bad(b, "a record after the last one");
	if (!b->begun) {
		if (kind != 'M' || n != sizeof magic - 1 || memcmp(text, magic, n) != 0)
			return bad(b, "not a bundle of this version");
		b->begun = true;
		return true;
	}
	if (kind == 'C') {
		if (!b->open)
			return bad(b, "bytes without a file");
		return took(b, s->bytes(b->self, payload, n), "write");
	}
	if (!close_open(b))
		return false;
	switch (kind) {
	case 'L':
		return limit(b, text);
	case 'A':
		return keep_string(b, b->args, &b->n_args, text, n);
	case 'E':
		if (n == 0 || text[0] == '=' || memchr(text, '=', n) == NULL)
			return bad(b, "a malformed environment variable");
		return keep_string(b, b->env, &b->n_env, text, n);
	case 'D':
		if (b->links || !path_ok(text, n))
			return bad(b, "a folder's path");
		return took(b, s->folder(b->self, text), "mkdir");
	case 'F':
		if (b->links || n < 2 || (text[0] != 'x' && text[0] != '-') || !path_ok(text + 1, n - 1))
			return bad(b, "a file's path");
		b->open = true;
		return took(b, s->file(b->self, text + 1, text[0] == 'x'), "create");
	case 'S': {
		const char *end = memchr(text, 0, n);

		if (!end || !path_ok(end + 1, n - 1 - (size_t)(end - text)) || !target_ok(text, end + 1))
			return bad(b, "a link's path or target");
		b->links = true; /* nothing is created after the first link, so nothing is created through one */
		return took(b, s->link(b->self, text, end + 1), "symlink");
	}
	case 'I':
		if (n != 0)
			return bad(b, "a malformed stdin record");
		b->open = true;
		return took(b, s->input(b->self), "stdin");
	case 'Z':
		if (n != 0 || b->n_args == 0 || b->plan.timeout_ms == 0)
			return bad(b, "an incomplete plan");
		b->plan.argv = b->args;
		b->plan.envp = b->env;
		b->done = true;
		return true;
	default:
		return bad(b, "an unknown record");
	}
}

bool bundle_feed(struct bundle *b, const uint8_t *data, size_t n)
{
	if (b->error)
		return false;
	while (n > 0) {
		if (b->header_len < sizeof b->header) {
			b->header[b->header_len++] = *data++;
			n--;
			if (b->header_len < sizeof b->header)
				continue;
			b->want = (size_t)b->header[1] | (size_t)b->header[2] << 8 | (size_t)b->header[3] << 16 |
				  (size_t)b->header[4] << 24;
			b->have = 0;
			if (b->want > BUNDLE_RECORD_MAX)
				return bad(b, "an over-long record");
		}
		size_t part = n < b->want - b->have ? n : b->want - b->have;

		memcpy(b->record + b->have, data, part);
		b->have += part;
		data += part;
		n -= part;
		if (b->have == b->want) {
			b->header_len = 0;
			b->record[b->want] = 0;
			if (!record(b, (char)b->header[0], b->record, b->want))
				return false;
		}
	}
	return true;
}

bool bundle_finish(struct bundle *b)
{
	if (!b->error && !b->done)
		b->error = "it ended too early";
	return b->error == NULL;
}
