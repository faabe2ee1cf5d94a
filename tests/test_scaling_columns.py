import pytest

from prime_jax.errors import UserError
from prime_jax.scaling import columns, readers
from prime_jax.scaling.settings import Choice


def test_columns_of_others_are_named(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("model,C,N,loss,val_loss\narm,1e18,1e8,9,3.2\n")
    found = readers.read(path)
    choice = Choice(columns="family=model, flops=C,params=N,loss=val_loss")
    new = columns.renamed(found, choice.names)
    assert new.rows == [{"family": "arm", "flops": "1e18", "params": "1e8", "loss": "3.2"}]
    assert new.columns == ["family", "flops", "params", "loss"]
    for names, message in (
        ("loss=val", r"no column 'val'; did you mean val_loss\?"),
        ("loss=C,flops=C", "one column stands for two"),
    ):
        with pytest.raises(UserError, match=message):
            columns.renamed(found, Choice(columns=names).names)
    for names in ("loss", "=a", "loss=a,,"):
        with pytest.raises(UserError, match="pairs such as"):
            Choice(columns=names)
