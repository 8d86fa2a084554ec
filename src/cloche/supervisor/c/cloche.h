/* The supervisor: the first process of every box. What its parts share. */
#ifndef CLOCHE_H
#define CLOCHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define FRAME_VERSION 1
#define WRITABLE_TMP "/tmp"
#define WRITABLE_SHM "/dev/shm"
#define LINE_MAX_BYTES 8192
#define PAYLOAD_MAX 6000 /* a multiple of 3: full frames need no base64 padding */

/* What could be applied; the same bits stand in frames.py (Hardening). */
enum hardening {
	HARD_PID_1 = 1,
	HARD_NO_NEW_PRIVS = 2,
	HARD_NO_CAPABILITIES = 4,
	HARD_SECCOMP = 8,
	HARD_SOCKETS_UNIX_ONLY = 16,
	HARD_LANDLOCK_WRITES = 32,
	HARD_LANDLOCK_SIGNALS = 64,
	HARD_OWN_UID = 128,
	HARD_WORKSPACE_SEALED = 256,
	HARD_MEMORY_WATCH = 512,
	HARD_OOM_COUNTER = 1024,
	HARD_NPROC = 2048,
	HARD_INODES = 4096,
};

/* How this box is to be kept; from the supervisor's own arguments, set by the backend. */
struct options {
	const char *bundles[64]; /* paths, or "-" for stdin */
	size_t n_bundles;
	const char *workspace, *output;
	int64_t script_uid, script_gid; /* -1: keep */
	uint64_t nofile, fsize;
	uint64_t nproc;        /* 0: leave it */
	uint64_t memory_watch; /* bytes; 0: a cgroup does it */
	uint64_t inodes;       /* of each writable tmpfs; 0: leave it */
	const char *program, *program_path; /* a bare name, and where in the box it is */
	bool sockets_unix_only;
	bool seal_workspace;
	bool lifeline;      /* whoever brought the bundle keeps stdin open for as long as he wants the box */
	bool need_landlock; /* nothing else keeps the workspace read-only */
};

/* What the script is and what bounds its run; from the bundle. */
struct plan {
	uint64_t timeout_ms, grace_ms, output_bytes, artifact_bytes, artifact_count;
	char **argv, **envp;
};

/* --- bundle.c ---------------------------------------------------------------------------------------------------- */

/* Where the reader puts what it finds. Each returns 0, or an errno. */
struct bundle_sink {
	int (*folder)(void *self, const char *path);
	int (*file)(void *self, const char *path, bool executable);
	int (*link)(void *self, const char *target, const char *path);
	int (*input)(void *self);
	int (*bytes)(void *self, const uint8_t *data, size_t n);
	int (*close)(void *self); /* no more bytes for the file or stdin that is open */
};

#define BUNDLE_RECORD_MAX (256u * 1024)
#define BUNDLE_ARENA (6u * 1024 * 1024) /* args and environment; the kernel's own bound for both is far lower */
#define BUNDLE_STRINGS 16384

struct bundle {
	const struct bundle_sink *sink;
	void *self; /* the sink's */
	struct plan plan;
	uint8_t header[5];
	size_t header_len, want, have;
	bool open, links, done, begun;
	const char *error;  /* set when a feed failed */
	int sink_errno;     /* the sink's, when it is what failed */
	size_t n_args, n_env, arena_len;
	char *args[BUNDLE_STRINGS + 1], *env[BUNDLE_STRINGS + 1];
	uint8_t record[BUNDLE_RECORD_MAX + 1];
	char arena[BUNDLE_ARENA];
};

void bundle_init(struct bundle *b, const struct bundle_sink *sink, void *self);
bool bundle_feed(struct bundle *b, const uint8_t *data, size_t n); /* false: see error */
bool bundle_finish(struct bundle *b);                             /* false: it ended too early */

/* --- unpack.c ---------------------------------------------------------------------------------------------------- */

struct unpacker {
	int root; /* the workspace, opened */
	int fd;   /* what is being written, or -1 */
	int input; /* the script's stdin, or -1 */
	bool to_input;
};

extern const struct bundle_sink unpack_sink; /* its self is a struct unpacker */

/* --- frames.c ---------------------------------------------------------------------------------------------------- */

void frames_init(int fd);
int frames_fd(void);
bool frames_pending(void);
bool frames_room(void);            /* for four more full frames */
bool frames_gone(void);            /* the reader is gone */
void frames_push(void);            /* write what the reader takes now */
bool frames_flush(uint64_t ms);    /* write all, waiting at most so long */
void frame_hello(void);
void frame_start(void);
void frame_output(char kind, uint64_t offset, const uint8_t *data, size_t n);
void frame_file(uint64_t size, bool truncated, const char *path);
void frame_data(const uint8_t *data, size_t n);
void frame_fail(const char *code, const char *format, ...) __attribute__((format(printf, 2, 3)));

struct ending {
	int status; /* of wait(2) */
	const char *cause;
	uint64_t run_us, cpu_us, peak_bytes, oom_kills;
	uint64_t bytes[2];
	bool truncated[2];
	uint64_t skipped;
	unsigned hardening;
};
void frame_end(const struct ending *e);

/* --- pump.c ------------------------------------------------------------------------------------------------------ */

bool pump_init(uint64_t cap); /* false: no memory */
/* Reads what the pipe has, as far as the reader of the frames keeps up. False at its end. */
bool pump_read(unsigned stream, int fd, uint64_t now_ms, uint64_t end_ms);
/* When its gathered bytes are to be sent; UINT64_MAX: when the frame is full, or nothing is gathered. */
uint64_t pump_due_ms(unsigned stream, uint64_t now_ms, uint64_t end_ms);
void pump_tick(uint64_t now_ms, uint64_t end_ms);   /* send what is due */
void pump_finish(unsigned stream);                  /* send the rest and the tail */
uint64_t pump_total(unsigned stream);
bool pump_truncated(unsigned stream);

/* --- harden.c ---------------------------------------------------------------------------------------------------- */

bool seal_workspace(const char *path);
bool bound_inodes(const char *path, uint64_t inodes); /* of a tmpfs */
bool drop_own_capabilities(bool all);
/* In the child, before exec. Returns NULL, or what could not be done (errno is set). Adds to *done what was applied. */
const char *harden_script(const struct options *o, pid_t supervisor, unsigned *done);

/* --- seccomp.c --------------------------------------------------------------------------------------------------- */

struct seccomp_rules {
	pid_t supervisor;
	bool sockets_unix_only;
	bool no_hidden_memory; /* refuse memory that a watch of the processes' sizes does not see */
};
bool seccomp_apply(const struct seccomp_rules *r);

/* --- watch.c ----------------------------------------------------------------------------------------------------- */

uint64_t tree_bytes(int64_t uid, uint64_t enough); /* memory of the script's processes; uid -1: all but this one */
bool oom_kills(uint64_t *count);                   /* of this box's cgroup */
uint64_t cgroup_peak_bytes(void);                  /* 0: not known */

/* --- collect.c --------------------------------------------------------------------------------------------------- */

uint64_t collect(const char *folder, uint64_t max_bytes, uint64_t max_count); /* gives how many it skipped */

/* --- script.c ---------------------------------------------------------------------------------------------------- */

struct script {
	pid_t pid;
	int pipes[2]; /* its stdout and stderr, to be read */
};
/* Starts it. False: a frame has told why. */
bool script_start(struct script *s, const struct options *o, const struct plan *p, int input, unsigned *hardening);
bool script_same_uid(const struct options *o);
bool become_script(const struct options *o); /* for what the supervisor does with the script's files; and back */
bool become_supervisor(void);
void kill_all(const struct options *o, int sig);

/* --- launch.c, probe.c, main.c ----------------------------------------------------------------------------------- */

int launch_main(int argc, char **argv);
int probe_main(int argc, char **argv);
uint64_t now_ms(void);
uint64_t now_us(void);
bool parse_u64(const char *text, uint64_t *value);

#endif
