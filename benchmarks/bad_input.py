"""What a user can get wrong and what is said then, from the list of the tests.

python benchmarks/bad_input.py

Writes benchmarks/results/bad_input.json, a list of {"area", "what", "outcome", "line"}, and the tables of
docs/bad_input.md.
"""

import itertools
import json
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "ops")]
RESULTS, PAGE = ROOT / "benchmarks/results/bad_input.json", ROOT / "docs/bad_input.md"
SEEDS = range(10)  # files changed at random, of each kind
CHANGED = "changed at random"
ABOUT_CHANGED = f"""
Each kind of file was damaged at random {len(SEEDS)} times (seeds {SEEDS[0]} to {SEEDS[-1]}). "One line": the
command refused it with one line. "Runs": the damage changed nothing that is checked, and the command went on.

| file | one line | runs |
|---|---|---|
"""
LONGEST = 200  # characters of a line that are shown
Result = dict[str, str]


def tables(results: list[Result]) -> str:
    """The part of the page that is made of the results: a table per area, and counts of what was random."""
    text = ""
    for area, rows in itertools.groupby(results, key=lambda each: each["area"]):
        text += f"\n## {area[0].upper()}{area[1:]}\n"
        if area == CHANGED:
            counts = Counter((each["what"].partition(":")[0], each["outcome"]) for each in rows)
            files = dict.fromkeys(name for name, _ in counts)
            lines = [f"| {name} | {counts[name, 'one line']} | {counts[name, 'runs']} |" for name in files]
            text += ABOUT_CHANGED + "\n".join(lines) + "\n"
        else:
            lines = [f"| {each['what']} | `{each['line'].replace('|', chr(92) + '|')}` |" for each in rows]
            text += "\n| what | what is said |\n|---|---|\n" + "\n".join(lines) + "\n"
    return text


def collect(sound: Path) -> list[Result]:
    """Break copies of the sound folder in every way, and note what is said."""
    from mistakes import kinds, words
    from mutations import FILES
    from sound_folder import server

    results = []
    with server() as address:
        for kind in kinds():
            arguments = [word.replace("SERVER", address) for word in kind.arguments]
            result = tried(sound, arguments, kind.damage, most=1)
            results.append(
                {
                    "area": kind.area,
                    "what": kind.what,
                    **result,
                    "line": result["line"].replace(address, "SERVER"),
                }
            )
    for name, (file, mutate, command) in FILES.items():
        for seed in SEEDS:
            content = mutate((sound / file).read_bytes(), random.Random(seed))

            def damage(folder: Path, file: str = file, content: bytes = content) -> None:
                (folder / file).unlink()
                (folder / file).write_bytes(content)

            result = tried(sound, words(command), damage)
            results.append({"area": CHANGED, "what": f"{name}: seed {seed}", **result})
    return results


def tried(sound: Path, arguments: list[str], damage, most: int | None = None) -> Result:
    """The outcome and the first line of a command in a broken copy; ``most`` lines at the most."""
    from sound_folder import copied, run

    with tempfile.TemporaryDirectory() as temporary:
        folder = copied(sound, Path(temporary).resolve() / "folder")
        damage(folder)
        outcome = run(arguments, folder)
    fits = most is None or len(outcome.lines) <= most
    line = "".join(outcome.lines[:1])
    for path in (folder, ROOT):
        line = line.replace(f"{path}/", "")
    line = "".join(each if " " <= each <= "~" else ascii(each)[1:-1] for each in line)
    shown = line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    return {"outcome": outcome.kind if fits else "broken", "line": shown}


def main() -> None:
    from sound_folder import write_sound

    with tempfile.TemporaryDirectory() as temporary:
        os.environ["SIM_M2F_CACHE"] = f"{temporary}/cache"
        write_sound(Path(temporary) / "sound")
        results = collect(Path(temporary) / "sound")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    first = results[0]["area"]
    head = PAGE.read_text().partition(f"\n## {first[0].upper()}{first[1:]}\n")[0]
    PAGE.write_text(head + tables(results))
    counts = Counter(each["outcome"] for each in results)
    print(f"{len(results)} inputs: {', '.join(f'{count} {kind}' for kind, count in counts.items())}")


if __name__ == "__main__":
    main()
