"""The page's style sheet: one column on a phone, two on a desktop; light, dark and paper by the same variables.

Curves take Okabe and Ito's colours, darkened or lightened to stand out from the ground, and differ in their marks as
well. No fonts and no pictures: nothing is fetched.
"""

from __future__ import annotations

STYLE_SHEET = """
:root {
  color-scheme: light;
  --ink: #1b2126; --soft: #5a6570; --line: #dfe4e8; --card: #ffffff; --page: #f4f6f8; --note: #fdf3dc;
  --curve-0: #0072b2; --curve-1: #d55e00; --curve-2: #00875f; --curve-3: #a8487f; --curve-4: #a97800;
  --curve-5: #55606b;
  --part-0: #0072b2; --part-1: #e69f00; --part-2: #d55e00; --part-3: #009e73; --part-4: #9aa5af;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --ink: #e8ecef; --soft: #9ba7b2; --line: #323a42; --card: #1a2026; --page: #11151a; --note: #3a3119;
    --curve-0: #56b4e9; --curve-1: #ff8a3d; --curve-2: #2fc79a; --curve-3: #e293c3; --curve-4: #e6b422;
    --curve-5: #b3bdc7;
    --part-0: #3b93cc; --part-1: #e6b422; --part-2: #e8703a; --part-3: #22b489; --part-4: #66717c;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 24px 20px 48px; max-width: 1200px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif;
}
h1 { margin: 0; font-size: 26px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 17px; }
h3 { margin: 0 0 8px; font-size: 15px; }
p { margin: 8px 0; max-width: 95ch; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.note { background: var(--note); border-radius: 6px; padding: 8px 12px; }
section {
  margin-top: 16px; padding: 18px 20px; border: 1px solid var(--line); border-radius: 10px; background: var(--card);
  min-width: 0;
}
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
.pair > section:only-child { grid-column: 1 / -1; }
.pair > section { margin-top: 16px; }
.pair + .pair, .pair + section { margin-top: 16px; }
.pair + .pair > section { margin-top: 0; }
svg { display: block; width: 100%; max-width: 620px; height: auto; margin: 0 auto; overflow: visible; }
svg * { stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0 0 8px; padding: 0; list-style: none; }
.legend li { overflow-wrap: anywhere; }
.numbers {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 18px 16px; margin: 0;
}
.numbers dt { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.numbers dd { margin: 0; font-size: 21px; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.numbers small { display: block; color: var(--soft); font-size: 13px; font-weight: 400; }
.scroll { overflow-x: auto; max-height: 70vh; }
table { border-collapse: collapse; min-width: 100%; font-variant-numeric: tabular-nums; }
th, td {
  padding: 6px 18px 6px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: break-word; max-width: 46ch;
}
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-size: 13px; font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; min-width: 3em; }
.runs tbody th { min-width: 9em; }
.facts tbody th { width: 1%; min-width: 13em; }
.number { text-align: right; white-space: nowrap; }
.best { font-weight: 700; }
code, pre { font: 13px/1.5 ui-monospace, monospace; }
code { overflow-wrap: anywhere; }
pre { margin: 8px 0 0; overflow-x: auto; }
details + details { margin-top: 8px; }
summary { cursor: pointer; overflow-wrap: anywhere; }
details > .scroll { margin-top: 8px; }
.c0 { color: var(--curve-0); } .c1 { color: var(--curve-1); } .c2 { color: var(--curve-2); }
.c3 { color: var(--curve-3); } .c4 { color: var(--curve-4); } .c5 { color: var(--curve-5); }
.p0 { color: var(--part-0); } .p1 { color: var(--part-1); } .p2 { color: var(--part-2); }
.p3 { color: var(--part-3); } .p4 { color: var(--part-4); }
@media (max-width: 800px) {
  body { padding: 16px 10px 32px; }
  section { padding: 14px 12px; }
  h1 { font-size: 22px; }
  .pair { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .pair + .pair > section { margin-top: 16px; }
  .pair + .pair { margin-top: 0; }
  .numbers { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px 12px; }
  .numbers dd { font-size: 18px; }
  th, td { padding-right: 14px; }
  .facts tbody th { min-width: 8em; }
}
@media print {
  body { max-width: none; padding: 0; background: none; font-size: 9pt; print-color-adjust: exact; }
  section { break-inside: avoid; margin-top: 12px; padding: 10px 12px; border-color: #ccc; }
  .scroll, pre { overflow: visible; max-height: none; white-space: normal; }
  pre { white-space: pre-wrap; }
  code, pre { font-size: 8pt; }
  table { font-size: 8pt; }
  thead th { font-size: 7.5pt; }
  th, td { padding: 3px 8px 3px 0; }
  .pair { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; }
  .pair + .pair > section { margin-top: 0; }
  .pair + .pair { margin-top: 12px; }
  svg { max-width: 400px; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""
