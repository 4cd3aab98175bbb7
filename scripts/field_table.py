"""Writes `docs/server/fields.md` from the table in `nanovllm/server/fields.py`.

python scripts/field_table.py            # write
python scripts/field_table.py --check    # fail when the page is not current
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanovllm.server.fields import render_page  # noqa: E402

PAGE = ROOT / "docs" / "server" / "fields.md"


def main() -> int:
    text = render_page()
    if "--check" in sys.argv[1:]:
        is_current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        if not is_current:
            print(f"{PAGE.relative_to(ROOT)} is not current: run python scripts/field_table.py", file=sys.stderr)
        return 0 if is_current else 1
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
