"""The look of the pages, light and dark, narrow and wide."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fff; --soft: #f4f6f8; --line: #dfe4e9; --ink: #1b2530; --faint: #5b6875;
  --accent: #1660a8; --heat-of: 22, 96, 168; --warn: #fff3dc; --warn-line: #d9902a }
@media (prefers-color-scheme: dark) { :root {
  --paper: #12171d; --soft: #1a2129; --line: #2d3742; --ink: #e4e9ee; --faint: #9aa7b4;
  --accent: #7db8f0; --heat-of: 95, 165, 235; --warn: #33270f; --warn-line: #d9a441 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif }
header, main { max-width: 68rem; margin: 0 auto; padding: 0 1.25rem }
header { padding-top: 2.5rem }
main { padding-bottom: 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
p, ul { margin: .6rem 0 }
ul { padding-left: 1.25rem }
li { margin: .25rem 0 }
.lead { color: var(--faint); margin-top: .4rem }
.faint { color: var(--faint); font-size: .9rem }
.warning { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .7rem 1rem }
.figure { display: flex; flex-wrap: wrap; gap: .25rem 2rem; margin: .25rem 0; color: var(--accent);
  font-size: 1.6rem; font-weight: 650; font-variant-numeric: tabular-nums }
code { font: .9em/1.5 ui-monospace, 'Cascadia Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace }
p code, li code, td code { background: var(--soft); padding: .1em .3em; border-radius: 3px;
  overflow-wrap: anywhere }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0;
  padding: .7rem .9rem; overflow-x: auto }
pre code { user-select: all; -webkit-user-select: all }
details { margin: .4rem 0 }
summary { cursor: pointer; color: var(--accent) }

.wide { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-size: .93rem }
th, td { text-align: left; vertical-align: top; font-weight: 400; padding: .32rem 1.4rem .32rem 0;
  border-bottom: 1px solid var(--line) }
thead th { color: var(--faint); font-size: .85rem; vertical-align: bottom }
.number { text-align: right; font-variant-numeric: tabular-nums }
td.number { white-space: nowrap }
table.heat th, table.heat td { padding: .25rem .5rem; text-align: right }
table.heat th[scope=row] { white-space: nowrap }
td.heat { background: rgba(var(--heat-of), calc(var(--heat) * .6)); min-width: 2.6rem }
table.pictures th, table.pictures td { padding: .25rem .9rem .25rem 0; vertical-align: middle }
table.pictures th { white-space: nowrap }
table.pictures .tiles { flex-wrap: nowrap }

.rows { display: grid; grid-template-columns: max-content 1fr; gap: .4rem .8rem; align-items: center;
  margin: .8rem 0 }
.row { display: contents }
.rows .name { max-width: 9rem; overflow-wrap: anywhere; color: var(--faint); font-size: .9rem;
  text-align: right }
.tiles { display: flex; flex-wrap: wrap; gap: 4px; padding: 1px }
.tile { flex: none; background-repeat: no-repeat; image-rendering: pixelated;
  outline: 1px solid var(--line) }
img { display: block; image-rendering: pixelated; background: #fff }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
  gap: 1.25rem; margin: .8rem 0 }
figure { margin: 0 }
figcaption { font-size: .9rem; margin-bottom: .25rem }
svg { display: block; width: 100%; height: auto; color: var(--faint); font: 11px system-ui, sans-serif }
.grid { stroke: var(--line) }
.curve { fill: none; stroke: var(--accent); stroke-width: 1.5 }
.raw { opacity: .3 }
circle { fill: var(--accent) }

@media (max-width: 40rem) {
  header { padding-top: 1.5rem }
  .rows { grid-template-columns: 1fr; gap: .2rem }
  .rows .name { text-align: left; max-width: none; margin-top: .4rem }
  table { font-size: .87rem }
  th, td { padding-right: .9rem }
}
@media print { section { break-inside: avoid-page } }
"""
