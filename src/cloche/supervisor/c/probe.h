/* The prober: what its parts share. It looks at the box from where a script would, and says what it sees; whether that is
 * well is decided elsewhere, by what is known of the engine. */
#ifndef CLOCHE_PROBE_H
#define CLOCHE_PROBE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* --- probe.c: one JSON object per line --------------------------------------------------------------------------- */

void see(const char *what);
void see_text(const char *name, const char *value);
void see_number(const char *name, int64_t value);
void see_list(const char *name);
void see_item(const char *text);
void see_list_end(void);
void see_end(void);
size_t read_text(const char *path, char *to, size_t room); /* a small file, without its last newline; 0: there is none */
const char *next_line(const char *at);                          /* NULL: there is none */

/* --- probe_calls.c, probe_network.c, probe_places.c, probe_limits.c ---------------------------------------------- */

void look_at_calls(pid_t guard);

struct target {
	const char *name; /* what it stands for */
	const char *to;   /* ADDRESS:PORT, an IPv6 address in brackets */
	bool datagrams;
};
void look_at_network(const struct target *targets, size_t n);
void listen_on(uint64_t port, uint64_t ms);

void look_at_places(void);
void look_at_credentials(void);
void look_at_devices(void);

void reach_processes(uint64_t count);
void reach_memory(uint64_t bytes);
void reach_cpu(uint64_t ms, uint64_t processes);
void reach_size(const char *folder, uint64_t bytes);
void reach_files(const char *folder, uint64_t count);

#endif
