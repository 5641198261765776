"""shared/streams.py: shards dealt to ranks and workers, orders and views by (seed, epoch), broken input, copies."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from server import serving
from shards import pair, png, write_tar
from torchvision import transforms

from shared import data, fetch, run, streams


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Eight shards of six pairs each; each shard has the keys SHARD-0 .. SHARD-5, its captions are numbers."""
    (tmp_path / "shards").mkdir()
    for i in range(8):
        write_tar(tmp_path / f"shards/{i}.tar", *sum(([*pair(f"{i}-{j}", f"{10 * i + j}")] for j in range(6)), []))
    return tmp_path / "shards"


ALL = [10 * i + j for i in range(8) for j in range(6)]
STATISTICS = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class Noise:
    """A view that shows the generator's state: (1,) random."""

    def __call__(self, image) -> torch.Tensor:
        return torch.rand(1)


def number(pair: data.Pair) -> torch.Tensor:
    return torch.tensor(int(pair.caption))


def stream_of(shards: Path | str, rank: int = 0, world_size: int = 1, **settings) -> streams.Stream:
    source = settings.pop("data", f"{shards}/{{0..7}}.tar")
    cfg = dict(data=source, dataset_size=48, batch_size=4, workers=0, strict=False, seed=7, stream=True)
    cfg |= dict(out="run", cache=str(Path(shards).parent / "cache")) | settings
    return streams.Stream(SimpleNamespace(**cfg), run.Process(rank, world_size, torch.device("cpu")), number)


def read(stream: streams.Stream, epoch: int = 0, start: int = 0, view=Noise()) -> list[tuple[list, list]]:  # noqa: B008
    """(captions' numbers, images) of the batches."""
    return [(texts.tolist(), images.tolist()) for _, images, texts in stream.epoch(epoch, view, start)]


def texts_of(batches: list[tuple[list, list]]) -> list[int]:
    return [text for texts, _ in batches for text in texts]


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_an_epoch_is_a_function_of_its_number(shards: Path, workers: int):
    stream = stream_of(shards, workers=workers)
    first, again, second = read(stream), read(stream_of(shards, workers=workers)), read(stream, 1)
    assert first == again and texts_of(first) != texts_of(second)
    assert len(first) == len(second) == stream.steps == 12 and len(stream) == 48
    if workers != 3:  # whose first two workers have three shards, and the last two
        assert sorted(texts_of(first)) == sorted(texts_of(second)) == ALL


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_have_shards_of_their_own_and_equally_many_batches(shards: Path, workers: int):
    parts = [read(stream_of(shards, rank, 2, workers=workers)) for rank in range(2)]
    assert [len(part) for part in parts] == [12, 12] and all(len(texts) == 2 for texts, _ in sum(parts, []))
    assert sorted(texts_of(parts[0]) + texts_of(parts[1])) == ALL
    of_shards = [{text // 10 for text in texts_of(part)} for part in parts]
    assert not of_shards[0] & of_shards[1] and len(of_shards[0]) == len(of_shards[1]) == 4


def test_a_rank_that_runs_out_reads_its_shards_again(shards: Path):
    """Seven shards: a rank has four, the other three."""
    source = f"{shards}/{{0..6}}.tar"
    parts = [texts_of(read(stream_of(shards, rank, 2, data=source, dataset_size=60))) for rank in range(2)]
    assert [len(part) for part in parts] == [30, 30]
    assert {len(set(part)) for part in parts} == {24, 18}
    fewer = next(part for part in parts if len(set(part)) == 18)
    assert len(set(fewer[:18])) == 18 and fewer[18:] != fewer[:12]  # a whole pass, then another order


def test_more_workers_than_shards(shards: Path):
    stream = stream_of(shards, workers=4, data=f"{shards}/{{0..1}}.tar", dataset_size=24)
    assert len(texts_of(read(stream))) == 24


def test_a_resumed_epoch_has_the_batches_that_are_left_in_a_fresh_order(shards: Path):
    whole, rest = read(stream_of(shards)), read(stream_of(shards), start=9)
    assert len(rest) == 3 and texts_of(rest) != texts_of(whole[9:])
    assert rest == read(stream_of(shards), start=9)


def test_views_depend_on_seed_epoch_and_key_alone(shards: Path):
    def views(stream: streams.Stream, epoch: int = 0) -> dict[int, list]:
        return {text: image for texts, images in read(stream, epoch) for text, image in zip(texts, images, strict=True)}

    one = views(stream_of(shards))
    assert one == views(stream_of(shards, workers=2)) and len({tuple(view) for view in one.values()}) == 48
    assert one[0] != views(stream_of(shards), 1)[0] and one[0] != views(stream_of(shards, seed=8))[0]


def test_images_are_normalised_and_tokens_cut_on_the_device(shards: Path):
    view = transforms.Compose([transforms.Resize((2, 2)), data.ToNormalizedTensor(*STATISTICS)])
    stream = stream_of(shards)
    stream.text, stream.cut_padding = lambda pair: torch.tensor([1, 2, 9, 0, 0]), True
    nothing, images, texts = next(iter(stream.epoch(0, view)))
    expected = view(data.decode_image(png()))
    assert nothing is None and torch.equal(images, expected.expand(4, 3, 2, 2)) and texts.tolist() == [[1, 2, 9]] * 4
    stream.cut_padding, stream.text = False, lambda pair: (torch.tensor(1), torch.tensor([2, 3]))
    first, second = next(iter(stream.epoch(0, view)))[2]
    assert first.shape == (4,) and second.shape == (4, 2)


# ------------------------------------------------------------------------------------------------------- broken input


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_told_once_an_epoch(shards: Path, workers: int, capsys: pytest.CaptureFixture):
    write_tar(shards / "3.tar", *pair("3-0", "30"), ("3-1.png", b"?"), ("3-1.txt", b"a cat"), ("3-2.txt", b"no image"))
    (shards / "5.tar").write_bytes((shards / "5.tar").read_bytes()[:3000])  # in the middle of its second pair
    stream = stream_of(shards, workers=workers)
    assert len(texts_of(read(stream))) == 48
    stream.report_broken("epoch 1")
    (told,) = capsys.readouterr().out.splitlines()
    assert told.startswith("epoch 1: 4 broken samples") and "1 truncated or damaged tar" in told
    assert "1 unreadable image" in told and "1 missing image" in told and "1 missing caption" in told
    stream.report_broken("epoch 1")
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match="--strict: sample"):
        read(stream_of(shards, workers=workers, strict=True))


def test_a_second_file_of_one_name_is_left_out(shards: Path):
    write_tar(shards / "0.tar", *pair("a", "1"), ("a.txt", b"2"))
    stream = stream_of(shards, data=f"{shards}/0.tar", dataset_size=4)
    assert texts_of(read(stream)) == [1] * 4
    assert set(stream.broken) == {data.Broken("a", "key occurs twice in its shard")}


def test_shards_without_a_pair_end_in_a_sentence(shards: Path):
    write_tar(shards / "0.tar", ("x.txt", b"no image"))
    with pytest.raises(ValueError, match="no readable .*missing image"):
        read(stream_of(shards, data=f"{shards}/0.tar"))


def test_settings_that_cannot_be(shards: Path):
    with pytest.raises(ValueError, match="less than one batch"):
        stream_of(shards, dataset_size=3)
    with pytest.raises(ValueError, match="8 shards .*9 processes"):
        stream_of(shards, world_size=9)
    with pytest.raises(ValueError, match=".tsv"):
        stream_of(shards, data="x.tsv")
    with pytest.raises(ValueError, match="every sample once"):
        next(stream_of(shards).epoch(0, Noise(), drop_last=False))


# -------------------------------------------------------------------------------------------------------- remote shards


def test_copies_of_remote_shards_go_and_a_killed_runs_too(shards: Path, tmp_path: Path):
    urls = "::".join(f"pipe:cat {shards}/{i}.tar" for i in range(8))
    stream, most = stream_of(shards, data=urls, workers=2), 0
    stream.folder.mkdir(parents=True)
    (stream.folder / "old.tar").write_bytes(b"left")
    for _ in stream.epoch(0, Noise()):
        most = max(most, len(list((tmp_path / "cache").rglob("*.tar"))))
    assert most <= 2 and not stream.folder.exists()
    first = iter(stream.epoch(0, Noise()))
    next(first)
    first.close()  # as an exception would
    assert not stream.folder.exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_a_faulty_server_arrive_whole(shards: Path, workers: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch, "PAUSE", 0)
    with serving(shards) as server:
        stream = stream_of(shards, data=f"{server.url}/{{0..7}}.tar", workers=workers)
        batches = read(stream)
    assert sorted(texts_of(batches)) == ALL and not stream.broken
    assert set(server.asked.values()) == {2}


def test_a_shard_that_is_gone_is_told(shards: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch, "PAUSE", 0)
    stream = stream_of(shards, data=f"pipe:cat {shards}/0.tar::pipe:exit 3", dataset_size=8)
    assert len(texts_of(read(stream))) == 8
    assert any(key == "pipe:exit 3" and "exit status 3" in reason for key, reason in stream.broken)
    with pytest.raises(ValueError, match="pipe:exit 3"):
        read(stream_of(shards, data="pipe:exit 3"))
