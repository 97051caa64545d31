import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.engines.build import cache_folder, find_compiler
from program import InputError
from tools.build_native import main


@pytest.mark.skipif(not find_compiler(), reason="needs a C++ compiler")
def test_the_library_is_there_afterwards(capsys):
    main([])
    assert f"the native engine is in {cache_folder()}" in capsys.readouterr().out
    assert list(cache_folder().glob("native-*.so"))


def test_weights_that_it_cannot_run_are_named(tmp_path, tiny):
    torch.save(tiny.state_dict(), tmp_path / "tiny.pt")
    with pytest.raises(InputError, match=r"tiny\.pt: the native engine runs networks with a multiple of 16 features"):
        main(["--pre_train", str(tmp_path / "tiny.pt")])


@pytest.mark.skipif(not find_compiler(), reason="needs a C++ compiler")
def test_a_library_that_is_not_kept_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    tool = Path(__file__).resolve().parents[2] / "tools/build_native.py"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "file")}
    done = subprocess.run([sys.executable, tool], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"but not kept: {tmp_path}/file/smsr cannot be used" in done.stdout
    assert done.stderr.startswith(f"error: {tmp_path}/file/smsr: cannot be written; set XDG_CACHE_HOME")
