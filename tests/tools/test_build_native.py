import pytest
import torch

from model.engines.build import cache_folder, find_compiler
from tools.build_native import main
from utility import InputError


@pytest.mark.skipif(not find_compiler(), reason="needs a C++ compiler")
def test_the_library_is_there_afterwards(capsys):
    main([])
    assert f"the native engine is in {cache_folder()}" in capsys.readouterr().out
    assert list(cache_folder().glob("native-*.so"))


def test_weights_that_it_cannot_run_are_named(tmp_path, tiny):
    torch.save(tiny.state_dict(), tmp_path / "tiny.pt")
    with pytest.raises(InputError, match=r"tiny\.pt: the native engine runs networks with a multiple of 16 features"):
        main(["--pre_train", str(tmp_path / "tiny.pt")])
