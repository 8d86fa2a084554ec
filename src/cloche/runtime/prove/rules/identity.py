"""Who the script is, and what the kernel lets it do. Pure."""

from __future__ import annotations

from errno import EACCES, ENOSYS, EPERM

from cloche.isolation import Guarantee, State
from cloche.runtime.prove.case import Case, broken, error_name, held, listed, unclear
from cloche.runtime.prove.observe import Call
from cloche.runtime.prove.rules.kernel import guest_kernel

REFUSALS = frozenset({EPERM, EACCES, ENOSYS})
"""What a filter, a missing right or a kernel without the call answers. Any other error means that the call got further: the
prober asks for what cannot be done."""
FATAL = frozenset({11, 31})
"""SIGSYS is a filter's; SIGSEGV is what a kernel without calls of 32 bits gives for one."""
SECCOMP_FILTER = 2
_NOT_LOOKED = "the prober did not come to it"


def was_refused(call: Call) -> bool:
    """Whether a call that was tried did not get through."""
    return call.errno in REFUSALS or call.signal in FATAL


def identity(case: Case) -> Guarantee:
    """Never root, and no way to become it."""
    name, who = "identity", case.look.identity
    if who is None or not who.uids or not who.gids:
        return unclear(name, _NOT_LOOKED)
    if 0 in who.uids or 0 in (*who.gids, *who.groups):
        return broken(
            name, f"the script has uid {who.uids[0]}, gid {who.gids[0]}, groups {who.groups}: one of them is root's"
        )
    became = [call.name for call in case.look.calls if call.group == "identity" and call.errno == 0]
    if became:
        return broken(name, f"the script may change who it is: {listed(became)} worked")
    groups = (
        f", groups {listed([str(g) for g in who.groups])}" if set(who.groups) - set(who.gids) else ", no other groups"
    )
    return held(name, f"the script has uid {who.uids[0]} and gid {who.gids[0]}{groups}; setuid(0) was refused")


def no_capabilities(case: Case) -> Guarantee:
    """None in any set: not those in use, and not those that a program could bring back."""
    name, who = "no-capabilities", case.look.identity
    if who is None or "CapEff" not in who.capabilities:
        return unclear(name, _NOT_LOOKED)
    left = [f"{kind} {value:#x}" for kind, value in who.capabilities.items() if value]
    if left:
        return broken(name, f"capabilities are left: {listed(left)}")
    return held(name, "every set of the kernel's is empty, the bounding set too")


def no_new_privileges(case: Case) -> Guarantee:
    """No program that it starts gives it rights, setuid or not."""
    name, who = "no-new-privileges", case.look.identity
    if who is None or who.no_new_privileges is None:
        return unclear(name, _NOT_LOOKED)
    if who.no_new_privileges != 1:
        return broken(name, "the kernel says NoNewPrivs 0: a setuid program would give the script rights")
    return held(name, "the kernel says NoNewPrivs 1")


def system_call_filter(case: Case) -> Guarantee:
    """Each call that no script needs was tried."""
    name, who = "system-call-filter", case.look.identity
    tried = [call for call in case.look.calls if call.group == "filter"]
    if who is None or not tried:
        return unclear(name, _NOT_LOOKED)
    if who.seccomp not in {None, SECCOMP_FILTER}:
        return broken(name, f"the kernel says Seccomp {who.seccomp}: no filter is installed")
    through = [f"{call.name} ({_answer(call)})" for call in tried if not was_refused(call) and _was_tried(call)]
    if through:
        return broken(name, f"calls get through that should not: {listed(through)}")
    untried = [call.name for call in tried if not _was_tried(call)]
    if untried:
        return unclear(name, f"some calls could not be tried: {listed(untried)}")
    return held(
        name,
        f"{len(tried)} calls were tried, of other architectures too (mount, unshare, ptrace, bpf …); all were refused",
    )


def engine_call_filter(case: Case) -> Guarantee | None:
    """The engine's own filter over the supervisor's, where it says that there is one."""
    name = "engine-call-filter"
    who = case.look.identity
    if case.claims(name) is None:
        return None
    if guest_kernel(case).state is State.IN_FORCE:
        return held(name, "a kernel of its own takes the calls, and makes few of the host's")
    if who is None or who.filters is None:
        return unclear(name, "the kernel does not say how many filters there are")
    if who.filters < 2:
        return broken(
            name,
            "the kernel counts one filter, which is the supervisor's: the engine has set none",
            "Have the engine use its default seccomp profile, and no privileged containers.",
        )
    return held(name, f"the kernel counts {who.filters} filters; the supervisor's is one of them")


def process_tree(case: Case) -> Guarantee:
    """The supervisor, which ends everything, is out of the script's reach."""
    name, who = "process-tree", case.look.identity
    tried = [call for call in case.look.calls if call.group == "guard"]
    if who is None or not tried:
        return unclear(name, _NOT_LOOKED)
    through = [f"{call.name} ({_answer(call)})" for call in tried if not was_refused(call)]
    if through:
        return broken(name, f"the script can reach its supervisor: {listed(through)}")
    place = "the box's first process" if who.guard == 1 else f"process {who.guard}, of another user"
    return held(name, f"the supervisor is {place}, and the script may not signal, trace or limit it")


def user_namespace(case: Case) -> Guarantee | None:
    """Whether uids of the box are nobody's on the host."""
    name = "user-namespace"
    who = case.look.identity
    if guest_kernel(case).state is State.IN_FORCE:
        return held(name, "a kernel of its own: no uid in it is one of the host's", needed=False)
    if who is None or not who.uid_map:
        return case.claims(name)
    rows = [tuple(map(int, row.split())) for row in who.uid_map.splitlines() if _is_map(row)]
    if not rows:
        return unclear(name, "the kernel's map of uids makes no sense", needed=False)
    if rows[0][0] == rows[0][1] and rows[0][2] >= 2**32 - 1:
        return broken(
            name,
            "uids of the box are the host's",
            "A user namespace is one more wall: rootless Docker or userns-remap, hostUsers: false in Kubernetes.",
            needed=False,
        )
    return held(name, f"uid {rows[0][0]} of the box is {rows[0][1]} outside", needed=False)


def _is_map(row: str) -> bool:
    words = row.split()
    return len(words) == 3 and all(word.isdecimal() for word in words)


def _was_tried(call: Call) -> bool:
    return call.errno is not None or call.signal is not None


def _answer(call: Call) -> str:
    if call.signal is not None:
        return f"signal {call.signal}"
    return "done" if call.errno == 0 else error_name(call.errno or 0)
