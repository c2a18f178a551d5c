"""`python -m kvtrim.tasks`: the page docs/tasks.md."""

import sys

from kvtrim.tasks.manual import manual

sys.stdout.write(manual())
