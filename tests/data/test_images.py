"""What counts as a picture, what is said of one that is missing or broken, and how a run keeps them."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from safeneuron.data.images import digest_of, keep_image, name_of, opened
from safeneuron.data.pairs import mix
from safeneuron.data.prompts import check_splits, read_prompts
from safeneuron.data.rows import Source
from safeneuron.data.types import Pair, Prompt
from safeneuron.errors import InputError
from tests import ROOT
from tests.helpers import tiny_vision

VISION = ROOT.parent / "shared/data/vision"


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    tiny_vision.picture(seed=3).save(path)
    return path


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_path_bytes_and_an_image_are_the_same_picture(cat: Path) -> None:
    image = Image.open(cat)
    pixels = opened(cat).tobytes()
    assert opened(str(cat)).tobytes() == opened(cat.read_bytes()).tobytes() == opened(image).tobytes() == pixels
    assert digest_of(str(cat)) == digest_of(cat.read_bytes()) != digest_of(tiny_vision.picture(seed=4))
    assert [name_of(one) for one in (cat, image, cat.read_bytes(), tiny_vision.picture())] == [
        "cat.png", "cat.png", "an image", "an image",
    ]  # fmt: skip


def test_pictures_are_upright_and_what_is_transparent_is_white(tmp_path: Path) -> None:
    assert opened(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert opened(Image.new("L", (2, 3), 7)).getpixel((1, 1)) == (7, 7, 7)
    turned = Image.new("RGB", (4, 2), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert opened(tmp_path / "turned.jpg").size == (2, 4)


@pytest.mark.parametrize("content", [b"", b"no picture at all", "cut"])
def test_broken_files_are_told_with_their_place(tmp_path: Path, cat: Path, content: bytes | str) -> None:
    (tmp_path / "bad.png").write_bytes(cat.read_bytes()[:-40] if content == "cut" else content)
    path = write(tmp_path / "prompts.jsonl", {"prompt": "what?", "image": "bad.png"})
    with pytest.raises(InputError, match=r"prompts.jsonl line 1: bad.png cannot be opened as an image \("):
        read_prompts(path)


def test_missing_files_are_told_with_the_near_one(tmp_path: Path, cat: Path) -> None:
    path = write(
        tmp_path / "prompts.jsonl", {"prompt": "what?", "image": "cat.png"}, {"prompt": "b", "image": "cats.png"}
    )
    with pytest.raises(InputError, match=r"line 2: the image .*cats.png does not exist \(did you mean 'cat.png'\?\)"):
        read_prompts(path)


def test_a_file_of_prompts_may_have_images_relative_to_it(tmp_path: Path, cat: Path) -> None:
    rows = [
        {"question": "What is it?", "image": "cat.png", "said": "Answer."},
        {"question": "Why?", "image": None},
        {"question": "And this?", "image": str(cat)},
    ]
    found = read_prompts(write(tmp_path / "prompts.jsonl", *rows))
    assert [prompt.image for prompt in found] == [str(cat), None, str(cat)]
    assert [prompt.written for prompt in found] == ["Answer.", "Why?", "And this?"]
    told = read_prompts(Source(str(tmp_path / "prompts.jsonl"), said="Look."))
    assert [prompt.written for prompt in told] == ["Look.", "Why?", "Look."]


def test_a_folder_of_pictures_is_a_prompt_each(tmp_path: Path) -> None:
    for number, name in enumerate(("b.png", "inner/c.jpg", "a.PNG")):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        tiny_vision.picture(seed=number).save(tmp_path / "all" / name)
    (tmp_path / "all" / "notes.txt").write_text("none")
    source = Source(str(tmp_path / "all"), said="Describe the image.")
    found = read_prompts(source)
    assert [(prompt.id, prompt.category) for prompt in found] == [
        ("a.PNG", ""),
        ("b.png", ""),
        ("inner/c.jpg", "inner"),
    ]
    assert {prompt.text for prompt in found} == {"Describe the image."}
    assert check_splits(unsafe=found) == [], "they differ by their pictures"
    with pytest.raises(InputError, match="is a directory; to ask about each image in it, give the question"):
        read_prompts(tmp_path / "all")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        read_prompts(Source(str(tmp_path / "none"), said="What?"))
    with pytest.raises(InputError, match="no text to draw"):
        read_prompts(Source(str(tmp_path / "all"), said="What?", as_image=True))


def test_records_keep_their_pictures_in_their_folder(tmp_path: Path, cat: Path) -> None:
    home = tmp_path / "run"
    prompts = [Prompt("a", image=str(cat)), Prompt("b", image=tiny_vision.picture(), said="Look."), Prompt("c")]
    records = [prompt.to_record(home) for prompt in prompts]
    assert records[2] == {"text": "c", "category": "", "id": ""}
    cat.unlink()
    again = [Prompt.from_record(record, home) for record in json.loads(json.dumps(records))]
    assert [prompt.written for prompt in again] == ["a", "Look.", "c"]
    assert opened(again[0].image).tobytes() == tiny_vision.picture(seed=3).tobytes()
    assert opened(again[1].image).tobytes() == tiny_vision.picture().tobytes()
    assert len(list((home / "images").iterdir())) == 2
    pair = Pair(({"role": "user", "content": "q"},), "no", "yes", "s", tiny_vision.picture())
    assert Pair.from_record(pair.to_record(home), home).image == again[1].image
    with pytest.raises(InputError, match="is no file, so a record cannot name it"):
        prompts[1].to_record()
    assert keep_image(tiny_vision.picture(), home) == str(Path(again[1].image).relative_to(home))


def test_prompts_and_pairs_that_differ_by_their_picture_differ() -> None:
    one, other = (tiny_vision.picture(seed=seed) for seed in (1, 2))
    asked = ({"role": "user", "content": "What?"},)
    pairs = [Pair(asked, "no", "yes", image=image) for image in (one, other, one)]
    assert len(mix(pairs, [], 1.0, None, seed=0)) == 2
    same = check_splits(
        a=[Prompt("What?", image=one)], b=[Prompt("what? ", image=one)], c=[Prompt("What?", image=other)]
    )
    assert len(same) == 1


@pytest.mark.skipif(not VISION.is_dir(), reason="the shared data is not beside this checkout")
def test_real_pictures_of_figstep_and_photographs_go_through_a_model() -> None:
    model = tiny_vision.model("qwen2-vl")
    for folder, count in (("figstep_tiny", 50), ("benign", 14)):
        found = read_prompts(Source(str(VISION / folder), said="What is in the image?"))
        assert len(found) == count
        assert all(len(model.ask(prompt)) > 20 for prompt in found[:4])


def test_a_picture_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", {"prompt": "what?", "image": 7})
    with pytest.raises(InputError, match="line 1: 'image' must be the path of an image, found 7"):
        read_prompts(path)
    assert opened(BytesIO(b"").getvalue() or tiny_vision.picture()).mode == "RGB"
