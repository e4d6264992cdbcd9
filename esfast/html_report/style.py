"""The page's frame and its look: one column, wide tables that scroll; light, dark, paper."""

from __future__ import annotations

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
$style
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="subtitle">$subtitle</p>
<nav aria-label="Contents">
$contents
</nav>
</header>
<main>
$sections
</main>
<footer>$foot</footer>
</body>
</html>
"""  # noqa: E501

STYLE = """
:root {
  --page: #ffffff; --ink: #1c2328; --soft: #5b6670; --line: #d9dee2; --faint: #f5f7f8;
  --link: #0b5f96; --changed: #fff4d6;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #14181b; --ink: #e4e8ea; --soft: #9aa6ae; --line: #323a40; --faint: #1c2226;
    --link: #7cc0ee; --changed: #3a3216;
  }
}
* { box-sizing: border-box; }
html { font-size: 16px; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 66rem; background: var(--page);
  color: var(--ink); line-height: 1.5;
  font-family: Charter, "Bitstream Charter", "Source Serif 4", Cambria, Georgia, serif;
}
h1, h2, nav, th, td, .caption, figcaption, .absent, footer, .subtitle {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; padding-top: .7rem;
  border-top: 1px solid var(--line); }
p { margin: .5rem 0 .9rem; max-width: 46rem; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
.subtitle { color: var(--soft); max-width: none; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .85rem; margin-top: 1rem; }
.wide { overflow-x: auto; margin: .8rem 0 1.4rem;  /* a shade where a table goes on */
  background:
    linear-gradient(to left, var(--page) 50%, transparent) right / 4rem 100% no-repeat local,
    linear-gradient(to left, var(--line), transparent) right / 1rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .82rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; border-top: 1.5px solid var(--ink);
  border-bottom: 1.5px solid var(--ink); }
.caption { color: var(--soft); font-size: .82rem; margin: 1.2rem 0 .45rem; max-width: none; }
.caption + .wide { margin-top: 0; }
.below { display: block; color: var(--soft); font-size: .92em; }
th, td { padding: .32rem .8rem .32rem 0; text-align: left; vertical-align: top; }
thead th { font-weight: 600; border-bottom: 1px solid var(--ink); vertical-align: bottom; }
tbody th { font-weight: 500; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
table.numbers td, table.numbers thead th:not(:first-child) { text-align: right; padding-left: .8rem;
  padding-right: 0; white-space: nowrap; }
table.numbers thead th:not(:first-child) { white-space: normal; min-width: 4.2rem; }
table.words td { overflow-wrap: anywhere; min-width: 8rem; max-width: 34rem; }
code, pre { font-size: .86em;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.changed { background: var(--changed); padding: 0 .25em; border-radius: 2px; }
figure { margin: 1rem 0 1.6rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .84rem; margin-top: .4rem; max-width: 52rem; }
.absent { color: var(--soft); font-size: .84rem; border-left: 3px solid var(--line);
  padding: .1rem 0 .1rem .7rem; max-width: none; }
.run { display: inline-flex; align-items: baseline; gap: .45em; }
.run .long { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
.swatch { flex: none; width: .72em; height: .72em; border-radius: 50%;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.soft { color: var(--soft); }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--line);
  color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
@media screen and (max-width: 44rem) {
  body { padding: 1.2rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  figure picture { display: block; overflow-x: auto; }
  figure img { min-width: 40rem; }  /* else its letters are three pixels high */
}
@media print {
  .wide { background: none; }
  html { font-size: 10pt; }
  body { padding: 0; max-width: none; }
  nav { display: none; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  thead { display: table-header-group; }
  table { font-size: 7.5pt; }
  th, td { padding-right: .5rem; }
  table.numbers td, table.numbers thead th:not(:first-child) { padding-left: .4rem; }
  .caption { break-after: avoid; }
  .wide { overflow: visible; }
  a { color: inherit; }
}
"""
