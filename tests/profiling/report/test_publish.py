"""Parts, reports and their files; what is said of broken ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fc.cli.main import main
from megatron_fc.errors import UserError
from megatron_fc.planning.counts import DeviceCount, DeviceKey, total_device
from megatron_fc.profiling.files import (
    clear,
    dump_part,
    parse_part,
    read_part,
    read_parts,
    read_report,
    write_part,
    write_report,
)
from megatron_fc.profiling.kinds import KindKey, LayerKinds, by_kind
from megatron_fc.profiling.records import report_of
from megatron_fc.profiling.report.publish import merge, publish
from megatron_fc.profiling.units import show_bytes, show_count, show_seconds
from support.example_report import RUN, device_counts, part, parts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run's."""
    for each in parts():
        write_part(tmp_path, each)
    publish(tmp_path, merge(tmp_path))
    return tmp_path


def test_files_give_back_what_was_written(folder: Path) -> None:
    assert read_parts(folder) == parts()
    assert read_report(folder) == read_report(folder / "traffic.json") == report_of(parts())
    assert parse_part(dump_part(part(3)), "text") == part(3)
    assert not list(folder.rglob("*.new")), "written in one step"


def test_sums_are_those_of_the_ranks() -> None:
    report = report_of(parts())
    counted = total_device(count for each in parts() for count in each.device.values())
    assert total_device(report.device.values()) == counted
    per_token = (counted.read_bytes + counted.written_bytes) / RUN.steps / RUN.tokens_per_step
    assert report.device_bytes_per_token == pytest.approx(per_token)
    assert sum(rank.device_bytes_per_step for rank in report.ranks) == pytest.approx(per_token * RUN.tokens_per_step)
    assert report.by_group()["tp"] == (8 * 2 * (4 << 16) / 2 / 1024, 0)
    assert report.by_group()["pp"] == (0, 4 * (1 << 16) / 2 / 1024)


def test_a_rank_that_was_lost_early_counts_by_its_own_steps() -> None:
    whole = part(0)
    half = replace(whole, rank=replace(part(0, steps=1).rank, rank=1), device=device_counts(0))
    report = report_of([whole, half])
    assert report.ranks[1].device_bytes_per_step == 2 * report.ranks[0].device_bytes_per_step
    assert [rank.rank for rank in report.incomplete] == [1]
    assert report.missing == [2, 3, 4, 5, 6, 7]
    first, second = report.warnings()
    assert first == "Nothing is known of ranks 2, 3, 4, 5, 6, 7: every sum is without them."
    assert second == "Rank 1 on node0 counted 1 of 2 steps, then the run broke off."


def test_what_no_counter_sees_is_said() -> None:
    run = replace(RUN, model={**RUN.model, "transformer_impl": "transformer_engine"})
    (warning,) = report_of([replace(each, run=run) for each in parts()]).warnings()
    assert warning.startswith("Transformer Engine starts kernels past torch's dispatcher")
    (warning,) = report_of([replace(each, run=replace(RUN, device="NVIDIA H100")) for each in parts()]).warnings()
    assert warning.startswith("Counted without torch.compile: ")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("embedding.word_embeddings", "embedding"),
        ("decoder.layers.0", "residual stream"),
        ("decoder.layers.0.input_layernorm.connection", "residual stream"),
        ("decoder.layers.0.pre_mlp_layernorm", "residual stream"),
        ("decoder.layers.0.self_attention.q_layernorm", "attention"),
        ("decoder.layers.0.self_attention.core_attention", "attention"),
        ("decoder.layers.0.mlp", "MoE"),
        ("decoder.layers.0.mlp.experts.local_experts.3.linear_fc1", "MoE"),
        ("decoder.layers.1.mlp", "MLP"),
        ("decoder.layers.1.mlp.linear_fc1", "MLP"),
        ("decoder.layers.2.mixer.in_proj", "Mamba"),
        ("decoder.layers.2.norm.connection", "residual stream"),
        ("mtp.layers.0.mtp_model_layer.self_attention.linear_qkv", "attention"),
        ("mtp.layers.0.eh_proj", "other"),
        ("decoder.final_layernorm", "output and loss"),
        ("output_layer", "output and loss"),
        ("", "output and loss"),
    ],
)
def test_kinds_of_layers(path: str, kind: str) -> None:
    assert LayerKinds(["decoder.layers.0.mlp.router", "decoder.layers.1.mlp.linear_fc1"]).of(path) == kind


def test_what_the_optimizer_does_is_its_own_kind() -> None:
    counts = {DeviceKey("optimizer", "", "aten._foreach_add_"): DeviceCount(1, 2, 3)}
    assert by_kind(counts) == {KindKey("optimizer", "optimizer"): DeviceCount(1, 2, 3)}


def test_markdown_has_the_figures(folder: Path) -> None:
    text = (folder / "traffic.md").read_text()
    report = read_report(folder)
    assert f"| pp | 0 B | {show_bytes(report.by_group()['pp'][1])} |" in text
    assert f"| 7 | node1 | {show_bytes(report.ranks[7].device_bytes_per_step)} |" in text
    assert "| residual stream |" in text
    step = sum(report.stream_bytes_per_token_and_layer().values()) * RUN.layers * RUN.tokens_per_step
    assert f"| - | {show_bytes(step)} |" in text


def test_merge_reports_without_the_missing_rank(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "parts" / "rank-00005.json").unlink()
    assert main(["traffic", "merge", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "WARNING: Nothing is known of rank 5: every sum is without it." in printed.err
    assert "dfc_x4: " in printed.out
    assert read_report(folder).missing == [5]


def test_clear_leaves_nothing_of_an_earlier_run(folder: Path) -> None:
    (folder / "logs").mkdir()
    clear(folder)
    assert [path.name for path in folder.iterdir()] in (["parts", "logs"], ["logs", "parts"])
    assert read_parts(folder) == []


def test_a_part_of_another_run_is_refused(folder: Path) -> None:
    write_part(folder, replace(part(5), run=replace(RUN, date="2020-01-01T00:00:00+00:00")))
    with pytest.raises(UserError, match=f"parts of several runs, of {RUN.date[:10]}.* and 2020-01-01"):
        merge(folder)


def test_a_report_without_ranks_stands_beside_none(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither what is given by --against, before anything starts, nor what it is given to."""
    lossy = tmp_path_factory.mktemp("lossy")
    write_report(lossy, report_of(parts("residual")[:7]))
    assert main(["traffic", "run", "/no/config.yaml", "--against", str(lossy)]) == 2
    assert (
        f"{lossy} lacks rank 7, wholly or in part, and so cannot be compared: profile again" in capsys.readouterr().err
    )
    assert main(["traffic", "merge", str(folder), "--against", str(lossy)]) == 2
    assert f"{lossy} lacks rank 7" in capsys.readouterr().err

    write_report(lossy, report_of(parts("residual")))
    (folder / "parts" / "rank-00005.json").unlink()
    assert main(["traffic", "merge", str(folder), "--against", str(lossy)]) == 2
    said = "this run, whose report is written without --against, lacks rank 5, wholly or in part"
    assert said in capsys.readouterr().err
    assert read_report(folder).missing == [5]
    assert "| residual | counted" not in (folder / "traffic.md").read_text()


def test_reports_beside_each_other_are_of_the_same_model(folder: Path) -> None:
    other = replace(report_of(parts("residual")), run=replace(RUN, model={**RUN.model, "hidden_size": 128}))
    with pytest.raises(UserError, match=r"differ in hidden_size \(64, 128\)"):
        publish(folder, merge(folder), [other])


def _cut_off(file: Path) -> None:
    file.write_text(file.read_text()[:1000])


def _other_schema(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": 7}))


def _no_report(file: Path) -> None:
    file.write_text('{"loss": 1}')


def _without_ranks(file: Path) -> None:
    content = json.loads(file.read_text())
    del content["ranks"]
    file.write_text(json.dumps(content))


def _without_schema(file: Path) -> None:
    content = json.loads(file.read_text())
    del content["schema"]
    file.write_text(json.dumps(content))


def _missing_nothing(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "missing": None}))


def _binary(file: Path) -> None:
    file.write_bytes(b"\x80\x00")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_cut_off, "{file} is not whole, "),
        (_other_schema, "{file} has schema 7, this megatron_fc reads schema 2: "),
        (_without_schema, "{file} has schema None, this megatron_fc reads schema 2: "),
        (_missing_nothing, "{file} lacks a field or has a wrong one, 'NoneType' object is not iterable: "),
        (_no_report, "{file} is no report of `megatron-fc traffic`: "),
        (_without_ranks, "{file} lacks a field or has a wrong one, 'ranks': "),
        (_binary, "{file} is no text: "),
        (Path.unlink, "cannot read {file}, No such file or directory: "),
    ],
)
def test_a_broken_report_is_one_sentence(
    folder: Path, spoil: object, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "traffic.json"
    spoil(file)  # type: ignore[operator]
    assert main(["traffic", "compare", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"megatron-fc: {sentence.format(file=file)}")
    assert said.count("\n") == 1


def test_a_broken_part_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    file = folder / "parts" / "rank-00002.json"
    _cut_off(file)
    with pytest.raises(UserError, match=r"rank-00002\.json is not whole"):
        merge(folder)
    with pytest.raises(UserError, match="is no part of"):
        read_part(folder / "traffic.json")
    with pytest.raises(UserError, match="holds no part of a rank"):
        merge(tmp_path / "nothing")


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(UserError, match=r"^/dev/null/x/traffic\.json cannot be written, Not a directory"):
        publish(Path("/dev/null/x"), report_of(parts()))


def test_figures_have_three_digits_and_a_unit() -> None:
    assert [show_bytes(n) for n in (0, 0.75, 12, 999, 1000, 1234, 45_678, 999_600, 3.5e12)] == [
        "0 B", "0.75 B", "12 B", "999 B", "1.00 kB", "1.23 kB", "45.7 kB", "1.00 MB", "3.50 TB",
    ]  # fmt: skip
    assert [show_seconds(s) for s in (0, 2.5e-5, 0.0123, 0.084, 1.5)] == [
        "0 s",
        "25.0 µs",
        "12.3 ms",
        "84.0 ms",
        "1.50 s",
    ]
    assert [show_count(n) for n in (17, 9_999, 6_919_161_856)] == ["17", "9,999", "6.92 G"]
