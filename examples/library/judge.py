"""Run code that somebody handed in, and tell what became of it: one synchronous call for each."""

import sys

import cloche

SUBMISSIONS = {
    "right": "print(sum(int(line) for line in open(0)))",
    "wrong": "print(42)",
    "crashes": "raise SystemExit('I give up')",
    "never ends": "while True: pass",
    "hungry": "x = [bytes(2**20) for _ in range(2**20)]",
    "curious": "print(open('/etc/shadow').read())",
}


def verdict(code: str) -> str:
    """What a judge would say, in a few words.

    Raises:
        cloche.ClocheError: the code could not be run at all, which is not its author's fault.
    """
    result = cloche.run(content=code, name="submission.py", stdin=b"19\n23\n1868\n", timeout=1, memory="64Mi")
    match result.outcome:
        case cloche.Outcome.EXITED if result.ok:
            return "accepted" if result.stdout.strip() == "1910" else f"wrong answer: {result.stdout.strip()}"
        case cloche.Outcome.EXITED:
            # The last line of a traceback says most.
            return f"exit code {result.exit_code}: {result.stderr.strip().splitlines()[-1]}"
        case cloche.Outcome.SIGNALED:
            return f"killed by {result.signal}"
        case outcome:
            return outcome.replace("_", " ")


def main() -> int:
    """Judge them all."""
    try:
        for name, code in SUBMISSIONS.items():
            print(f"{name:<12}{verdict(code)}", flush=True)
    except cloche.ClocheError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
