"""What strangers install. `.ci/release` and `.ci/ranges` try it for real, in environments of their own."""

import sys

from tests.runs import REPOSITORY

sys.path.insert(0, str(REPOSITORY / ".ci"))
