"""The demo's prompt, in one place for the demo itself, its reference tokens and its tests."""

from pathlib import Path

DOCUMENT = Path("/usr/share/common-licenses/GPL-3")
DOCUMENT_TOKENS = 7000
QUESTION = "How does the GNU General Public License protect your rights?"
MAX_NEW_TOKENS = 83
