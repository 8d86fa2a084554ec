/* Two streams of the script, each kept within its cap: the head is sent as it comes, what follows goes into a ring that
 * holds the tail, all the rest is counted and let go.
 *
 * A frame costs some 56 bytes beside its payload, so small writes are gathered. Each stream may send SMALL_FRAMES frames
 * that are not full. The first half is spent freely, at growing intervals; the second half is spread over the time that the
 * run still has, so that a script that chatters to its end is still seen live. Full frames are bounded by the cap itself. */
#include "cloche.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SMALL_FRAMES 1024u

struct stream {
	uint64_t total;    /* bytes that the script wrote */
	uint64_t sent;     /* of the head */
	unsigned small;    /* frames sent that were not full */
	uint64_t last_ms;  /* when one was sent last */
	uint64_t since_ms; /* since when something is gathered */
	size_t gathered;
	uint8_t pending[PAYLOAD_MAX];
	uint8_t *ring; /* tail_cap bytes */
};

static struct stream streams[2];
static uint64_t head_cap, tail_cap;

bool pump_init(uint64_t cap)
{
	tail_cap = cap / 4;
	head_cap = cap - tail_cap;
	if (tail_cap == 0)
		return true;
	/* Now, not when the script has already used up the box's memory. */
	uint8_t *rings = mmap(NULL, 2 * (size_t)tail_cap, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (rings == MAP_FAILED)
		return false;
	streams[0].ring = rings;
	streams[1].ring = rings + tail_cap;
	return true;
}

static char kind(unsigned i)
{
	return i == 0 ? 'o' : 'e';
}

static void send_gathered(unsigned i, uint64_t now)
{
	struct stream *s = &streams[i];

	if (s->gathered == 0)
		return;
	frame_output(kind(i), s->sent, s->pending, s->gathered);
	s->small += s->gathered < PAYLOAD_MAX;
	s->sent += s->gathered;
	s->gathered = 0;
	s->last_ms = now;
}

/* How long two small frames must be apart now. */
static uint64_t spacing_ms(const struct stream *s, uint64_t now, uint64_t end)
{
	if (s->small < SMALL_FRAMES / 2)
		return 2 + s->small / 16;
	if (s->small >= SMALL_FRAMES)
		return UINT64_MAX;
	return 2 + (end > now ? end - now : 0) / (SMALL_FRAMES - s->small);
}

static void keep(unsigned i, const uint8_t *data, size_t n, uint64_t now)
{
	struct stream *s = &streams[i];

	while (n > 0 && s->sent + s->gathered < head_cap) {
		size_t part = PAYLOAD_MAX - s->gathered;

		if (part > n)
			part = n;
		if (part > head_cap - s->sent - s->gathered)
			part = (size_t)(head_cap - s->sent - s->gathered);
		if (s->gathered == 0)
			s->since_ms = now;
		memcpy(s->pending + s->gathered, data, part);
		s->gathered += part;
		s->total += part;
		data += part;
		n -= part;
		if (s->gathered == PAYLOAD_MAX || s->sent + s->gathered == head_cap)
			send_gathered(i, now);
	}
	while (n > 0) {
		if (tail_cap == 0) {
			s->total += n;
			return;
		}
		size_t at = (size_t)((s->total - head_cap) % tail_cap);
		size_t part = tail_cap - at < n ? (size_t)(tail_cap - at) : n;

		memcpy(s->ring + at, data, part);
		s->total += part;
		data += part;
		n -= part;
	}
}

uint64_t pump_due_ms(unsigned i, uint64_t now, uint64_t end)
{
	const struct stream *s = &streams[i];
	uint64_t spacing = spacing_ms(s, now, end);

	if (s->gathered == 0 || spacing == UINT64_MAX)
		return UINT64_MAX;
	return s->last_ms + spacing > s->since_ms + 1 ? s->last_ms + spacing : s->since_ms + 1;
}

bool pump_read(unsigned i, int fd, uint64_t now, uint64_t end)
{
	static uint8_t chunk[64 * 1024];

	/* What is read of the head at once fills at most three frames, and there is room for four: writing them never waits. */
	for (int rounds = 0; rounds < 4 && frames_room(); rounds++) {
		bool head = streams[i].sent + streams[i].gathered < head_cap;
		ssize_t n = read(fd, chunk, head ? 2 * PAYLOAD_MAX : sizeof chunk);

		if (n < 0)
			return errno == EAGAIN || errno == EINTR;
		if (n == 0)
			return false;
		keep(i, chunk, (size_t)n, now);
	}
	pump_tick(now, end);
	return true;
}

void pump_tick(uint64_t now, uint64_t end)
{
	for (unsigned i = 0; i < 2; i++)
		if (pump_due_ms(i, now, end) <= now && frames_room())
			send_gathered(i, now);
}

void pump_finish(unsigned i)
{
	struct stream *s = &streams[i];

	send_gathered(i, 0);
	if (s->total <= head_cap || tail_cap == 0)
		return;
	uint64_t beyond = s->total - head_cap; /* bytes that went into the ring */
	uint64_t left = beyond < tail_cap ? beyond : tail_cap;

	for (uint64_t offset = s->total - left; left > 0;) {
		size_t at = (size_t)((offset - head_cap) % tail_cap), part = PAYLOAD_MAX;

		if (part > left)
			part = (size_t)left;
		if (part > tail_cap - at)
			part = (size_t)(tail_cap - at);
		frame_output(kind(i), offset, s->ring + at, part);
		offset += part;
		left -= part;
	}
}

uint64_t pump_total(unsigned i)
{
	return streams[i].total;
}

bool pump_truncated(unsigned i)
{
	return streams[i].total > head_cap + tail_cap;
}
