import shutil
import sysconfig
from pathlib import Path

import pytest

from megatron_fc.data.corpus import (
    MAX_BYTES,
    MIN_BYTES,
    Document,
    Root,
    collect,
    installed_roots,
    is_validation,
    sample,
)


def _text(word: str) -> str:
    return f"{word} says that this line is long enough.\n" * 10


def _write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def _names(documents: list[Document]) -> list[str]:
    return [document.name for document in documents]


def test_documents_are_ordered_by_a_name_that_does_not_depend_on_where_the_root_lies(tmp_path: Path) -> None:
    first = _write(tmp_path / "a", {"z.py": _text("z"), "sub/b.md": _text("b"), "a.rst": _text("a")})
    second = Path(shutil.copytree(first, tmp_path / "elsewhere" / "deep"))

    documents = collect([Root("lib", first)])

    assert _names(documents) == ["lib/a.rst", "lib/sub/b.md", "lib/z.py"]
    assert documents == collect([Root("lib", second)])


def test_order_of_the_roots_does_not_matter(tmp_path: Path) -> None:
    one = Root("one", _write(tmp_path / "one", {"a.py": _text("a"), "same.py": _text("same")}))
    two = Root("two", _write(tmp_path / "two", {"b.py": _text("b"), "same.py": _text("same")}))

    assert collect([one, two]) == collect([two, one])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin1.py", _text("caf\u00e9").encode("latin-1")),
        ("empty.py", b""),
        ("tiny.py", b"x" * (MIN_BYTES - 1)),
        ("long.py", b"x" * (MAX_BYTES + 1)),
        ("LICENSE.txt", _text("licence")),
        ("_sysconfigdata__linux.py", _text("generated")),
        ("library.so", _text("not a text suffix")),
        ("tests/test_x.py", _text("test")),
        ("sub/__pycache__/x.py", _text("cache")),
        ("site-packages/x.py", _text("installed beside the standard library")),
    ],
)
def test_unusable_files_are_left_out(tmp_path: Path, name: str, content: str | bytes) -> None:
    folder = _write(tmp_path, {"good.py": _text("good"), name: content})

    assert _names(collect([Root("lib", folder)])) == ["lib/good.py"]


@pytest.mark.parametrize("size", [MIN_BYTES, MAX_BYTES])
def test_size_limits_are_inclusive_and_count_bytes(tmp_path: Path, size: int) -> None:
    folder = _write(tmp_path, {"edge.py": "\u00e9" * (size // 2)})

    assert _names(collect([Root("lib", folder)])) == ["lib/edge.py"]


def test_a_broken_link_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")

    assert collect([Root("lib", tmp_path)]) == []


def test_of_equal_files_only_the_first_by_name_stays(tmp_path: Path) -> None:
    folder = _write(tmp_path, {"b.py": _text("x"), "a.py": _text("x"), "c.py": _text("x").replace("\n", "\r\n")})

    assert collect([Root("lib", folder)]) == [Document("lib/a.py", _text("x"))]


def test_metadata_gives_its_long_description_only(tmp_path: Path) -> None:
    folder = _write(
        tmp_path,
        {
            "METADATA": f"Metadata-Version: 2.4\nName: x\nLicense: all rights\n\n{_text('readme')}",
            "licenses/x/README.md": _text("all rights"),
        },
    )

    assert collect([Root("x-description", folder)]) == [
        Document("x-description/METADATA", _text("readme")),
    ]


def test_the_split_holds_its_share_and_depends_on_the_name_alone(tmp_path: Path) -> None:
    names = [f"lib/module_{number}.py" for number in range(4000)]
    share = sum(is_validation(Document(name, "text"), 0.025) for name in names) / len(names)

    assert 0.02 < share < 0.03
    assert all(is_validation(Document(name, "a"), 0.5) == is_validation(Document(name, "b"), 0.5) for name in names)


def test_a_document_keeps_its_side_when_another_file_is_added(tmp_path: Path) -> None:
    folder = _write(tmp_path, {f"m{number}.py": _text(str(number)) for number in range(40)})
    before = {d.name: is_validation(d, 0.5) for d in collect([Root("lib", folder)])}
    _write(tmp_path, {"a_new_first_file.py": _text("new")})

    after = {d.name: is_validation(d, 0.5) for d in collect([Root("lib", folder)])}

    assert set(before.values()) == {True, False}
    assert after.keys() - before.keys() == {"lib/a_new_first_file.py"}
    assert {name: after[name] for name in before} == before


def test_a_name_that_is_not_utf8_can_be_split(tmp_path: Path) -> None:
    (tmp_path / b"caf\xe9.py".decode("utf-8", "surrogateescape")).write_text(_text("x"))
    (document,) = collect([Root("lib", tmp_path)])

    assert is_validation(document, 1.0)


def test_the_sample_is_bounded_mixed_and_independent_of_the_order() -> None:
    documents = [Document(f"{root}/{n}", "x" * 100) for root in "abcd" for n in range(50)]

    chosen = sample(documents, max_bytes=3050)

    assert len(chosen) == 30
    assert chosen == sample(list(reversed(documents)), max_bytes=3050)
    assert {document.name[0] for document in chosen} == set("abcd")
    assert len(sample(documents, max_bytes=1)) == 1


def test_installed_roots_are_the_standard_library_and_the_packages_of_this_environment() -> None:
    roots = {root.name: root for root in installed_roots()}

    assert len(roots) == len(installed_roots())
    assert roots["python"].folder == Path(sysconfig.get_path("stdlib"))
    assert roots["numpy"].version == roots["numpy-description"].version != ""
    assert all(root.folder.is_dir() for root in roots.values())


def test_real_files_of_the_standard_library() -> None:
    folder = Path(sysconfig.get_path("stdlib")) / "json"

    documents = {document.name: document.text for document in collect([Root("python/json", folder)])}

    assert documents["python/json/decoder.py"] == (folder / "decoder.py").read_text(encoding="utf-8")
