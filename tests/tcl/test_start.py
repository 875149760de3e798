"""What training starts from; whole runs: test_train.py."""

import pickle
import warnings

from tclkit.tcl.start import read_own_clip


def test_a_pickle_of_others_is_no_clip_of_ours_and_no_warning_of_torch(tmp_path):
    (tmp_path / "clip.pkl").write_bytes(pickle.dumps({"a": 1}))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert read_own_clip(tmp_path / "clip.pkl") is None
    assert seen == []
