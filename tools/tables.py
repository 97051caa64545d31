"""Tables as HTML, Markdown and LaTeX."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


@dataclass(frozen=True)
class Table:
    """A table whose cells are plain text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]  # one cell per column
    n_names: int = 1  # the first columns hold names and are aligned to the left, the others to the right
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column) of cells in bold
    footer: Sequence[str] = ()  # a last row that stays in place when the table is sorted; empty: none

    def html(self) -> str:
        head = self._html_row("th", map(html.escape, self.columns))
        rows = "".join(self._html_row("td", row) for row in self._with_bold(html.escape, "<b>{}</b>"))
        foot = f"<tfoot>{self._html_row('td', map(html.escape, self.footer))}</tfoot>" if self.footer else ""
        return f"<table><thead>{head}</thead><tbody>{rows}</tbody>{foot}</table>"

    def _html_row(self, tag, cells):
        kinds = (' class="name"' if column < self.n_names else "" for column in range(len(self.columns)))
        return f"<tr>{''.join(f'<{tag}{kind}>{cell}</{tag}>' for kind, cell in zip(kinds, cells, strict=True))}</tr>"

    def markdown(self) -> str:
        aligned = ["---" if column < self.n_names else "---:" for column in range(len(self.columns))]
        lines = [[*map(_to_markdown, self.columns)], aligned, *self._with_bold(_to_markdown, "**{}**")]
        if self.footer:
            lines.append([*map(_to_markdown, self.footer)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def latex(self) -> str:
        """A tabular that needs the package booktabs."""
        align = "l" * self.n_names + "r" * (len(self.columns) - self.n_names)
        body = [
            r"\toprule",
            [*map(_to_latex, self.columns)],
            r"\midrule",
            *self._with_bold(_to_latex, r"\textbf{{{}}}"),
        ]
        if self.footer:
            body += [r"\midrule", [*map(_to_latex, self.footer)]]
        lines = [line if isinstance(line, str) else rf"{' & '.join(line)} \\" for line in body]
        return "\n".join(
            [
                rf"\begin{{tabular}}{{{align}}}  % needs \usepackage{{booktabs}}",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )

    def _with_bold(self, escape, bold):
        """The rows with escaped cells, the best ones in bold."""
        return [
            [
                bold.format(escape(cell)) if (row, column) in self.best else escape(cell)
                for column, cell in enumerate(cells)
            ]
            for row, cells in enumerate(self.rows)
        ]


def _to_markdown(text: str) -> str:
    return text.replace("|", "\\|")


def _to_latex(text: str) -> str:
    return text.translate(LATEX)
