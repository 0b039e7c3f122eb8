"""What a rank's writer tells the others of an error."""

import errno
import pickle

import pytest

from services.study.fence import Fenced
from services.train.job import TrialFailed
from services.train.saver import _portable


class ConnectorError(OSError):
    """An error as network libraries have them: made of what cannot travel."""

    def __init__(self, key, cause):
        super().__init__(cause.errno, cause.strerror)
        self.key = key


@pytest.mark.parametrize(
    "error, kind, words",
    [
        (OSError(errno.ENOSPC, "no space left", "/shared/x"), OSError, "no space left: '/shared/x'"),
        (OSError("the ranks wrote 3 files, there are 2"), OSError, "the ranks wrote 3 files"),
        (ConnectorError(lambda: 0, OSError(errno.ECONNREFUSED, "refused")), OSError, "refused"),
        (Fenced("replaced"), Fenced, "replaced"),
        (TrialFailed("a line"), TrialFailed, "a line"),
        (KeyError("lost"), RuntimeError, "KeyError: 'lost'"),
    ],
)
def test_an_error_reaches_the_other_ranks_with_its_kind_and_words(error, kind, words):
    found = pickle.loads(pickle.dumps(_portable(error)))
    assert isinstance(found, kind) and words in str(found)
    if isinstance(error, OSError):
        assert found.errno == error.errno


def test_no_error_is_none():
    assert _portable(None) is None
