"""Builds that are killed, interrupted, or run out of disk: what is finished stays, nothing is half there, and the next run ends well.

Real processes and real signals, at moments drawn from a seed.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from megatron_vocagno.corpus.dataset import AlignedDataset
from megatron_vocagno.corpus.shards import Job, Result, Settings, finished, make_shard
from megatron_vocagno.corpus.plan import plan
from tests import tokenizers_for_tests as real
from tests.corpus.conftest import contents, make, write_jsonl
from tests.corpus.test_build_dataset import arguments, start, wait_until
from tests.corpus.test_build_dataset import finished as ended
from tests.corpus.test_workers import children, runs
