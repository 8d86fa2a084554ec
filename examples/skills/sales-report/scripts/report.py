#!/usr/bin/env python3
"""Turn a CSV of sales into a summary and a chart. `report.py --help` tells how; SKILL.md what comes out."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TypeVar

import chart

T = TypeVar("T")

COLUMNS = ("date", "region", "customer", "product", "quantity", "amount")


@dataclass(frozen=True)
class Sale:
    """One row that could be read. The amount is negative for a refund."""

    day: date
    region: str
    customer: str
    product: str
    quantity: int
    amount: Decimal

    @property
    def month(self) -> str:
        return f"{self.day:%Y-%m}"


@dataclass(frozen=True)
class Complaint:
    """One row that could not be read, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class Summary:
    """What `summary.json` holds. Amounts are in the currency of the file; the largest come first."""

    orders: int
    refunds: int
    revenue: float
    first_day: str
    last_day: str
    by_month: dict[str, float]
    by_region: dict[str, float]
    by_product: dict[str, float]
    top_customers: dict[str, float]
    left_out: list[Complaint]


class UsageError(Exception):
    """The caller has to change something; the message says what."""


def main() -> int:
    options = arguments()
    try:
        rows = list(read(options.csv))
        options.output.mkdir(parents=True, exist_ok=True)
    except (UsageError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2

    complaints = [row for row in rows if isinstance(row, Complaint)]
    sales = [row for row in rows if isinstance(row, Sale) and options.region in (None, row.region)]
    for complaint in complaints:
        print(f"line {complaint.line} left out: {complaint.reason}", file=sys.stderr, flush=True)
    progress(f"read {len(rows)} rows of {options.csv}, {len(complaints)} of them left out")
    if not sales:
        print("report.py: nothing to report", file=sys.stderr)
        return 1

    summary = summarise(sales, complaints, options.top)
    write(options.output / "summary.json", json.dumps(asdict(summary), ensure_ascii=False, indent=2) + "\n")
    write(options.output / "summary.md", markdown(options.title, summary))
    write(options.output / "chart.svg", chart.stacked_bars(options.title, by_month_and_region(sales)))
    print()
    print(table(summary))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Turn a CSV of sales into a summary and a chart.")
    parser.add_argument("csv", type=Path, help="the sales; SKILL.md describes the columns")
    parser.add_argument("--region", help="report this region alone")
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="how many customers to name (default: 5)")
    parser.add_argument("--title", default="Sales", help="heading of report and chart (default: Sales)")
    parser.add_argument("--output", type=Path, default=Path("/output"), metavar="DIR", help="default: /output")
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def read(path: Path) -> Iterator[Sale | Complaint]:
    """Every row of the file, as a sale or as a complaint.

    Raises:
        UsageError: there is no such file, it is not UTF-8, or a column is missing.
    """
    try:
        # A byte order mark is what spreadsheets write in front.
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise UsageError(f"{path} has no column {', '.join(missing)}; its first line must name the columns")
            for row in rows:
                yield parse(row, rows.line_num)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (byte {error.start}); save it as CSV UTF-8") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def parse(row: dict[str, str], line: int) -> Sale | Complaint:
    text = {name: (row[name] or "").strip() for name in COLUMNS}
    empty = [name for name in COLUMNS if not text[name]]
    if empty:
        return Complaint(line, f"no {' and no '.join(empty)}")
    try:
        return Sale(
            day=read_as(date.fromisoformat, text["date"], "date"),
            region=text["region"],
            customer=text["customer"],
            product=text["product"],
            quantity=read_as(int, text["quantity"], "whole number"),
            amount=read_as(money, text["amount"], "amount"),
        )
    except ValueError as error:
        return Complaint(line, str(error))


def read_as(kind: Callable[[str], T], text: str, what: str) -> T:
    try:
        return kind(text)
    except (ValueError, InvalidOperation):
        raise ValueError(f"{text!r} is no {what}") from None


def money(text: str) -> Decimal:
    amount = Decimal(text.replace(",", ""))
    if not amount.is_finite():
        raise ValueError(text)
    return amount


def summarise(sales: list[Sale], complaints: list[Complaint], top: int) -> Summary:
    customers = totals((sale.customer, sale.amount) for sale in sales)
    return Summary(
        orders=len(sales),
        refunds=sum(sale.amount < 0 for sale in sales),
        revenue=cents(sum(sale.amount for sale in sales)),
        first_day=min(sale.day for sale in sales).isoformat(),
        last_day=max(sale.day for sale in sales).isoformat(),
        by_month=dict(sorted(totals((sale.month, sale.amount) for sale in sales).items())),
        by_region=totals((sale.region, sale.amount) for sale in sales),
        by_product=totals((sale.product, sale.amount) for sale in sales),
        top_customers=dict(list(customers.items())[:top]),
        left_out=complaints,
    )


def totals(amounts: Iterable[tuple[str, Decimal]]) -> dict[str, float]:
    """The sum for each name, largest first."""
    sums: defaultdict[str, Decimal] = defaultdict(Decimal)
    for name, amount in amounts:
        sums[name] += amount
    return {name: cents(sums[name]) for name in sorted(sums, key=lambda name: -sums[name])}


def cents(amount: Decimal | int) -> float:
    return float(round(amount, 2))


def by_month_and_region(sales: list[Sale]) -> dict[str, dict[str, float]]:
    months = sorted({sale.month for sale in sales})
    regions = sorted({sale.region for sale in sales})
    return {
        month: {
            region: cents(sum(sale.amount for sale in sales if (sale.month, sale.region) == (month, region)))
            for region in regions
        }
        for month in months
    }


def markdown(title: str, summary: Summary) -> str:
    lines = [
        f"# {title}",
        "",
        f"{summary.orders} orders from {summary.first_day} to {summary.last_day}, {summary.refunds} of them refunds.",
        f"**{summary.revenue:,.2f}** in all.",
        "",
        "![Revenue by month and region](chart.svg)",
    ]
    for heading, amounts in (
        ("Month", summary.by_month),
        ("Region", summary.by_region),
        ("Product", summary.by_product),
        ("Customer", summary.top_customers),
    ):
        lines += ["", f"| {heading} | Revenue |", "|---|---:|"]
        lines += [f"| {name} | {amount:,.2f} |" for name, amount in amounts.items()]
    if summary.left_out:
        lines += ["", "Left out:", ""]
        lines += [f"- line {complaint.line}: {complaint.reason}" for complaint in summary.left_out]
    return "\n".join(lines) + "\n"


def table(summary: Summary) -> str:
    most = max(*summary.by_month.values(), 1)
    lines = [f"{'month':<9}{'revenue':>12}"]
    for month, amount in summary.by_month.items():
        lines.append(f"{month:<9}{amount:>12,.2f}  {'█' * round(24 * max(amount, 0) / most)}")
    lines.append(f"{'total':<9}{summary.revenue:>12,.2f}  {summary.orders} orders, {summary.refunds} refunds")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    progress(f"wrote {path}")


def progress(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
