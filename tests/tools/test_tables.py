import html.parser

from tools.tables import Table

TABLE = Table(
    columns=["set", "a|b", "PSNR"],
    rows=[["A_1", "x|y & <z>", "38.00"], ["", "50% \\ {#}", "-"]],
    n_names=2,
    best=frozenset({(0, 2)}),
    footer=["mean", "", "37"],
)


def test_markdown():
    assert TABLE.markdown().splitlines() == [
        r"| set | a\|b | PSNR |",
        "| --- | --- | ---: |",
        r"| A_1 | x\|y & <z> | **38.00** |",
        r"|  | 50% \ {#} | - |",
        "| mean |  | 37 |",
    ]


def test_latex():
    assert TABLE.latex().splitlines() == [
        r"\begin{tabular}{llr}  % needs \usepackage{booktabs}",
        r"\toprule",
        r"set & a|b & PSNR \\",
        r"\midrule",
        r"A\_1 & x|y \& <z> & \textbf{38.00} \\",
        r" & 50\% \textbackslash{} \{\#\} & - \\",
        r"\midrule",
        r"mean &  & 37 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_html_holds_the_cells_as_text():
    class Reader(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.cells, self.bold = [], []

        def handle_starttag(self, tag, attributes):
            if tag in ("th", "td"):
                self.cells.append("")
            if tag == "b":
                self.bold.append(len(self.cells) - 1)

        def handle_data(self, text):
            self.cells[-1] += text

    reader = Reader()
    reader.feed(TABLE.html())
    assert reader.cells == [*TABLE.columns, *TABLE.rows[0], *TABLE.rows[1], *TABLE.footer]
    assert reader.bold == [5]
