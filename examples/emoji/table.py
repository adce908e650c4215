"""Print the gaps that training results close, as a Markdown table: python examples/emoji/table.py NAME=RESULT.json ..."""

import json
import sys
from pathlib import Path

print("| student | calls | metric | undistilled | student | teacher, 50 calls | gap closed |\n|" + " --- |" * 7)
for name, path in (argument.split("=", 1) for argument in sys.argv[1:]):
    gaps = json.loads(Path(path).read_text())["metrics"]["gap_closed"]
    files = {"": gaps} if "retrieval" in gaps else gaps  # of one weight file, or {file: gaps} if the run wrote several
    for metric in ("retrieval", "frechet"):
        for file, calls, gap in [(file, *row) for file, table in files.items() for row in table[metric].items()]:
            label = f"{name}, full weights" if file.endswith("-full") else name
            figures = f"{gap['teacher']:.3f} | {gap['student']:.3f} | {gap['teacher_50']:.3f}"
            closed, low, high = ("" if gap[k] is None else f"{100 * gap[k]:.0f}" for k in ("gap_closed", "low", "high"))
            verdict = "within the noise" if gap["gain_low"] <= 0 <= gap["gain_high"] else f"{closed} % [{low}, {high}]"
            print(f"| {label} | {calls} | {metric} | {figures} | {verdict} |")
