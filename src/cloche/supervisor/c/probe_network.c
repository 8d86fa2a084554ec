/* Which sockets can be made, which interfaces there are, and what answers. All connections are tried at once, within one short
 * time; nothing is sent over them but a question for a name that does not exist, where only an answer shows a way. */
#include "cloche.h"
#include "probe.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define WAIT_MS 400u
#define TRIES_MAX 32u
#define SAID_MAX 64u

/* A question for the address of "cloche.invalid" (RFC 2606): an answer of any kind is an answer. */
static const char question[] = "\xc1\x0c\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x06" "cloche" "\x07" "invalid" "\x00\x00\x01\x00\x01";

struct try {
	const char *name, *where; /* where it failed: "socket", "connect" or "answer" */
	char to[80];
	bool datagrams, connected, done;
	int fd, error;
	char said[SAID_MAX + 1]; /* the first bytes that came by themselves */
};

static struct try tries[TRIES_MAX];
static size_t n_tries;

/* ADDRESS:PORT or [ADDRESS]:PORT. No names: to look one up is a connection too. */
static socklen_t parse_address(const char *text, struct sockaddr_storage *to)
{
	char host[64];
	const char *colon = strrchr(text, ':');
	uint64_t port;
	size_t n;

	if (!colon || !parse_u64(colon + 1, &port) || port > 65535)
		return 0;
	n = (size_t)(colon - text);
	if (text[0] == '[' && n > 2 && text[n - 1] == ']')
		text++, n -= 2;
	if (n >= sizeof host)
		return 0;
	memcpy(host, text, n);
	host[n] = 0;

	struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
	struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};

	if (inet_pton(AF_INET, host, &four.sin_addr) == 1) {
		memcpy(to, &four, sizeof four);
		return sizeof four;
	}
	if (inet_pton(AF_INET6, host, &six.sin6_addr) == 1) {
		memcpy(to, &six, sizeof six);
		return sizeof six;
	}
	return 0;
}

static void failed(struct try *t, const char *where, int error)
{
	t->where = where;
	t->error = error;
	t->done = true;
}

static void begin(const char *name, const char *address, bool datagrams)
{
	struct sockaddr_storage to;
	struct try *t = &tries[n_tries];
	socklen_t size = parse_address(address, &to);

	if (size == 0 || n_tries == TRIES_MAX)
		return;
	n_tries++;
	*t = (struct try){.name = name, .datagrams = datagrams, .where = "answer"};
	snprintf(t->to, sizeof t->to, "%s", address);
	t->fd = socket(to.ss_family, (datagrams ? SOCK_DGRAM : SOCK_STREAM) | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (t->fd < 0) {
		failed(t, "socket", errno);
		return;
	}
	if (connect(t->fd, (const struct sockaddr *)&to, size) == 0) {
		t->connected = !datagrams;
		if (datagrams && send(t->fd, question, sizeof question - 1, 0) < 0)
			failed(t, "connect", errno);
	} else if (errno != EINPROGRESS) {
		failed(t, "connect", errno);
	}
}

static void listen_to(struct try *t)
{
	ssize_t n = recv(t->fd, t->said, SAID_MAX, 0);

	if (n >= 0) {
		t->said[n] = 0;
		t->connected = t->done = true;
	} else if (errno != EAGAIN) {
		/* One that was made and then cut was made all the same. */
		if (t->connected)
			t->done = true;
		else
			failed(t, "connect", errno);
	}
}

static void go_on(struct try *t, short events)
{
	int error = 0;
	socklen_t size = sizeof error;

	if (!t->datagrams && !t->connected) {
		if (getsockopt(t->fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0)
			error = errno;
		if (error != 0) {
			failed(t, "connect", error);
			return;
		}
		t->connected = true;
	}
	if (events & (POLLIN | POLLERR | POLLHUP))
		listen_to(t);
}

static void wait_for_all(void)
{
	uint64_t end = now_ms() + WAIT_MS;

	for (;;) {
		struct pollfd fds[TRIES_MAX];
		size_t of[TRIES_MAX];
		nfds_t n = 0;
		uint64_t now = now_ms();

		for (size_t i = 0; i < n_tries; i++)
			if (!tries[i].done) {
				bool begun = tries[i].connected || tries[i].datagrams;

				of[n] = i;
				fds[n++] = (struct pollfd){.fd = tries[i].fd, .events = begun ? POLLIN : POLLOUT};
			}
		if (n == 0 || now >= end || (poll(fds, n, (int)(end - now)) < 0 && errno != EINTR))
			break;
		for (nfds_t i = 0; i < n; i++)
			if (fds[i].revents)
				go_on(&tries[of[i]], fds[i].revents);
	}
	for (size_t i = 0; i < n_tries; i++) {
		if (!tries[i].done && !tries[i].connected)
			failed(&tries[i], "answer", ETIMEDOUT);
		if (tries[i].fd >= 0)
			close(tries[i].fd);
	}
}

static void look_at_sockets(void)
{
	static const struct {
		const char *name;
		int family, type;
	} kinds[] = {
		{"inet-stream", AF_INET, SOCK_STREAM},	 {"inet-dgram", AF_INET, SOCK_DGRAM},
		{"inet6-stream", AF_INET6, SOCK_STREAM}, {"inet6-dgram", AF_INET6, SOCK_DGRAM},
		{"netlink", AF_NETLINK, SOCK_RAW},	 {"packet", 17 /* AF_PACKET */, SOCK_RAW},
		{"vsock", 40 /* AF_VSOCK */, SOCK_STREAM}, {"alg", 38 /* AF_ALG */, SOCK_SEQPACKET},
		{"inet-raw", AF_INET, SOCK_RAW},	 {"unix", AF_UNIX, SOCK_STREAM},
	};

	for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
		int fd = socket(kinds[i].family, kinds[i].type | SOCK_CLOEXEC, 0);

		see("socket");
		see_text("kind", kinds[i].name);
		see_number("errno", fd < 0 ? errno : 0);
		see_end();
		if (fd >= 0)
			close(fd);
	}
}

static void look_at_interfaces(void)
{
	char text[8192], name[32];
	const char *at = text;

	see("interfaces");
	see_list("names");
	read_text("/proc/self/net/dev", text, sizeof text);
	/* Two lines of headings, then one for each. */
	for (int i = 0; at && i < 2; i++)
		at = next_line(at);
	for (int i = 0; at && *at && i < 32; i++) {
		at += strspn(at, " ");
		snprintf(name, sizeof name, "%.*s", (int)strcspn(at, ":\n"), at);
		see_item(name);
		at = next_line(at);
	}
	see_list_end();
	see_end();
}

/* Who would be asked for names. */
static void add_resolvers(void)
{
	char text[4096], address[96], where[64];
	int found = 0;

	read_text("/etc/resolv.conf", text, sizeof text);
	for (const char *at = text; at && *at && found < 3; at = next_line(at))
		if (sscanf(at, "nameserver %60[0-9a-fA-F.:]", where) == 1) {
			snprintf(address, sizeof address, strchr(where, ':') ? "[%s]:53" : "%s:53", where);
			begin("resolver", address, true);
			found++;
		}
}

/* The way out, where there is one. */
static void add_gateway(void)
{
	char text[4096], address[32];
	unsigned to, gateway;

	read_text("/proc/self/net/route", text, sizeof text);
	for (const char *at = strchr(text, '\n'); at; at = strchr(at + 1, '\n'))
		if (sscanf(at + 1, "%*s %8x %8x", &to, &gateway) == 2 && to == 0 && gateway != 0) {
			/* As the kernel prints it: the bytes of the network in the machine's own order. */
			snprintf(address, sizeof address, "%u.%u.%u.%u:443", gateway & 255, gateway >> 8 & 255,
				 gateway >> 16 & 255, gateway >> 24);
			begin("gateway", address, false);
			return;
		}
}

/* The address that others would reach this box by: of the interface with the way out. Nothing is sent. */
static bool own_address(char *to, size_t room)
{
	/* Documentation's addresses, which are nobody's (RFC 5737, RFC 3849). */
	static const char *const nobody[] = {"192.0.2.1:9", "[2001:db8::1]:9"};
	struct sockaddr_storage other, own;
	bool found = false;

	for (size_t i = 0; !found && i < sizeof nobody / sizeof *nobody; i++) {
		socklen_t size = parse_address(nobody[i], &other), own_size = sizeof own;
		int fd = socket(other.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);

		if (fd < 0)
			continue;
		if (connect(fd, (const struct sockaddr *)&other, size) == 0 &&
		    getsockname(fd, (struct sockaddr *)&own, &own_size) == 0) {
			struct sockaddr_in four;
			struct sockaddr_in6 six;

			memcpy(&four, &own, sizeof four);
			memcpy(&six, &own, sizeof six);
			found = own.ss_family == AF_INET ? inet_ntop(AF_INET, &four.sin_addr, to, (socklen_t)room) != NULL
							 : inet_ntop(AF_INET6, &six.sin6_addr, to, (socklen_t)room) != NULL;
		}
		close(fd);
	}
	return found;
}

/* For another box of the same engine: it is told where, and this one greets whoever comes, until its time is over. */
void listen_on(uint64_t port, uint64_t ms)
{
	struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
	struct sockaddr_in any_four = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
	char address[64] = "";
	uint64_t end = now_ms() + ms;
	int64_t guests = 0;
	int error = 0, fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);

	/* One of IPv6 takes both, where there is IPv6. */
	if (fd < 0 || bind(fd, (const struct sockaddr *)&any, sizeof any) != 0) {
		if (fd >= 0)
			close(fd);
		fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (fd < 0 || bind(fd, (const struct sockaddr *)&any_four, sizeof any_four) != 0)
			error = errno;
	}
	if (error == 0 && listen(fd, 8) != 0)
		error = errno;
	own_address(address, sizeof address);
	see("listen");
	see_text("address", address);
	see_number("port", (int64_t)port);
	see_number("errno", error);
	see_end();
	for (uint64_t now = now_ms(); error == 0 && now < end; now = now_ms()) {
		struct pollfd one = {.fd = fd, .events = POLLIN};

		if (poll(&one, 1, (int)(end - now)) > 0) {
			int guest = accept(fd, NULL, NULL);

			if (guest >= 0) {
				guests += send(guest, "cloche", 6, MSG_NOSIGNAL) == 6;
				close(guest);
			}
		}
	}
	if (fd >= 0)
		close(fd);
	see("listened");
	see_number("guests", guests);
	see_end();
}

void look_at_network(const struct target *targets, size_t n)
{
	look_at_sockets();
	look_at_interfaces();
	/* Where clouds tell a machine its credentials: most of them, AWS over IPv6, AWS's containers, Alibaba. */
	begin("metadata", "169.254.169.254:80", false);
	begin("metadata", "[fd00:ec2::254]:80", false);
	begin("metadata", "169.254.170.2:80", false);
	begin("metadata", "100.100.100.200:80", false);
	add_resolvers();
	add_gateway();
	for (size_t i = 0; i < n; i++)
		begin(targets[i].name, targets[i].to, targets[i].datagrams);
	wait_for_all();
	for (size_t i = 0; i < n_tries; i++) {
		const struct try *t = &tries[i];

		see("connect");
		see_text("name", t->name);
		see_text("to", t->to);
		see_text("by", t->datagrams ? "udp" : "tcp");
		see_number("errno", t->error);
		if (t->error != 0)
			see_text("at", t->where);
		if (t->said[0] && !t->datagrams)
			see_text("said", t->said);
		see_end();
	}
}
