"""The rows of a long run: python examples/emoji/table.py NAME=RESULT.json ..."""

import json
import sys
from pathlib import Path

print("| student | calls | metric | undistilled | student | teacher, 50 calls | gap closed |\n|" + " --- |" * 7)
for name, path in (argument.split("=", 1) for argument in sys.argv[1:]):
    gaps = json.loads(Path(path).read_text())["metrics"]["gap_closed"]
    files = {"": gaps} if "retrieval" in gaps else gaps  # of one file, or of each that the run wrote
    for metric in ("retrieval", "frechet"):
        for calls, gap in ((calls, gap) for table in files.values() for calls, gap in table[metric].items()):
            closed, low, high = (100 * gap[k] for k in ("gap_closed", "low", "high"))
            figures = f"{gap['teacher']:.3f} | {gap['student']:.3f} | {gap['teacher_50']:.3f}"
            print(f"| {name} | {calls} | {metric} | {figures} | {closed:.0f} % [{low:.0f}, {high:.0f}] |")
