"""What the exits cost: time, tokens and energy."""

from __future__ import annotations

from megatron_ee.checkpoint.adapter import WEIGHTS
from megatron_ee.errors import printable
from megatron_ee.evaluation.page.blocks import Block, CommandLine, FactList, Paragraph, Section
from megatron_ee.evaluation.page.material import Material
from megatron_ee.tuning.log import LOG
from megatron_ee.tuning.status import STATUS


def cost_section(material: Material) -> Section:
    """Time, tokens and energy, as far as they are known."""
    t, run, plan = material.t, material.run, material.measured.plan
    items, sources = [], []
    if run is not None:
        effort = run.effort
        items.append(
            (
                t("cost.steps"),
                t("cost.steps_of", done=t.number(effort.steps), planned=t.number(effort.planned)),
                t(f"cost.state.{effort.state}") if f"cost.state.{effort.state}" in t.texts else "",
            )
        )
        if effort.tokens is not None:
            items.append((t("cost.tokens"), t.number(effort.tokens), t("cost.tokens_meaning")))
        if effort.seconds is not None:
            device = printable(effort.device) if effort.device else t("cost.no_device")
            where = t("cost.where", processes=effort.processes, device=device)
            items.append((t("cost.time"), t.duration(effort.seconds), where))
        elif effort.step_seconds is not None:
            of = t("cost.steps_alone", count=t.number(effort.logged_steps))
            items.append((t("cost.time"), t.duration(effort.step_seconds), of))
        items.append((t("cost.disk"), t.size(run.weights_bytes), t("cost.disk_meaning")))
        files = (run.path / LOG, run.path / STATUS, run.adapter.path / WEIGHTS)
        sources += [str(file) for file in files if file.is_file()]
    if plan is not None:
        found = plan.content
        device = t("cost.planned_on", gpus=found.gpus, gpu=printable(found.gpu or t("cost.device")))
        if found.seconds is not None:
            items.append((t("cost.planned_time"), t.duration(found.seconds), device))
        if found.kilowatt_hours is not None:
            items.append((t("cost.energy"), f"{t.number(found.kilowatt_hours, 1)} kWh", t("cost.energy_meaning")))
        if found.price is not None:
            items.append((t("cost.price"), t.number(found.price, 2), t("cost.price_meaning")))
        sources.append(str(plan.path))
    blocks: list[Block] = [FactList(items)] if items else [Paragraph(t("cost.missing"), "note")]
    if plan is None or plan.content.kilowatt_hours is None:
        command = "megatron-ee plan --config RUN.yaml --gpu NAME --json > plan.json"
        blocks.append(CommandLine(t("cost.no_energy"), command))
    return Section("cost", t("cost.title"), blocks, sources)
