"""Run two skills at once, show their output while it appears, and keep what they left in the folder that is named."""

import sys
from pathlib import Path

import anyio

import cloche

SKILLS = Path(__file__).parents[1] / "skills"

SPECS = {
    "report": cloche.Spec(
        script="scripts/report.py", args=("data/sales.csv", "--top", "3"), workspace=SKILLS / "sales-report"
    ),
    "count": cloche.Spec(script="scripts/count.sh", args=("-n", "3", "data/fable.txt"), workspace=SKILLS / "wordcount"),
}


async def show(sandbox: cloche.Sandbox, name: str, spec: cloche.Spec, files: dict[str, bytes]) -> None:
    """Follow one run to its end; what it left goes into ``files``."""
    async for event in sandbox.stream(spec):
        match event:
            case cloche.Started(isolation=isolation):
                print(f"{name:>7} ┌ isolation: {isolation}")
            case cloche.Output(stream=stream, data=data):
                # Pieces of output come as they were written; whole lines are not promised.
                for line in data.decode(errors="replace").splitlines():
                    print(f"{name:>7} {'│' if stream == 'stdout' else '!'} {line}")
            case cloche.Artifact(path=path, data=data):
                files[f"{name}/{path}"] = data
            case cloche.Finished(outcome=outcome, exit_code=code, run_ms=run_ms):
                print(f"{name:>7} └ {outcome}, exit code {code}, {run_ms:.0f} ms")


async def main() -> dict[str, bytes]:
    """Run all of them in one sandbox."""
    files: dict[str, bytes] = {}
    async with cloche.Sandbox.from_env() as sandbox, anyio.create_task_group() as tasks:
        for name, spec in SPECS.items():
            tasks.start_soon(show, sandbox, name, spec, files)
    return files


if __name__ == "__main__":
    try:
        left = anyio.run(main)
    except cloche.ClocheError as error:
        sys.exit(f"{error.code}: {error}")
    for path, data in left.items():
        print(f"{path}: {len(data)} bytes")
        if len(sys.argv) > 1:
            # cloche has checked that no path leads out of the folder.
            target = Path(sys.argv[1]) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
