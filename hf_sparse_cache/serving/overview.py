"""What an operator sees at `/`: who asks, what was reused, what was not and what would help, and the tree of prefixes.

One page made on the server, without scripts: it is as new as its last request, and asks for itself again every few
seconds only when told to (`/?every=5`), so that nothing moves under a reader's eyes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jinja2
from markupsafe import Markup

from ..explain import remedy
from ..stats import counted, format_bytes
from ..tools import notebook
from .service import Service
from .tickets import Ticket


_MOST_TREES, _MOST_LIVE = 8, 50


def overview_page(service: Service, every: int | None = None) -> str:
    """The page as HTML.

    Args:
        every: seconds after which it asks for itself again; None for never.
    """
    metrics = service.metrics
    share = 100 * metrics.cached_tokens / metrics.prompt_tokens if metrics.prompt_tokens else 0.0
    figures = [
        ("answers", f"{metrics.answers:,}"),
        ("prompt tokens", f"{metrics.prompt_tokens:,}"),
        ("of them cached", f"{metrics.cached_tokens:,} ({share:.1f} %)"),
        ("in the line now", f"{service.line.inside:,}"),
    ]
    for tier in service.store.tiers:
        limit = "" if tier.max_memory is None else f" of {format_bytes(tier.max_memory)}"
        figures.append(
            (f"stored in {tier.name}", f"{format_bytes(tier.used_bytes)}{limit}, {counted(len(tier), 'checkpoint')}")
        )
    return _TEMPLATE.render(
        model=service.model_name,
        mode=service.config.exactness,
        every=every,
        figures=figures,
        live=[_row(ticket) for ticket in list(service.live.values())[:_MOST_LIVE]],
        recent=[_row(ticket) for ticket in reversed(metrics.recent)],
        misses=list(_misses(service)),
        trees=list(_trees(service)),
        now=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _row(ticket: Ticket) -> dict[str, Any]:
    info = ticket.requests[0] if ticket.requests else None
    end = time.monotonic() if ticket.ended is None else ticket.ended
    first = "" if ticket.first_token is None else f"{ticket.first_token - ticket.arrived:.2f}"
    return {
        "endpoint": ticket.endpoint,
        "namespace": ticket.namespace,
        "state": ticket.state if ticket.ended is None else "failed" if ticket.error else "answered",
        "prompt": "" if info is None else f"{info.prompt_tokens:,}",
        "cached": "" if info is None else f"{info.resumed_tokens:,}",
        "first": first,
        "tokens": f"{ticket.tokens:,}",
        "seconds": f"{end - ticket.arrived:.2f}",
        "why": str(ticket.error or (info.reason if info else "")),
    }


def _misses(service: Service) -> Iterator[tuple[str, int, str]]:
    for cause, count in service.metrics.reasons.most_common():
        reason = service.metrics.last_of[cause]
        yield str(reason), count, remedy(reason)


def _trees(service: Service) -> Iterator[tuple[str, Markup]]:
    for namespace, handle in service.tenants.all()[:_MOST_TREES]:
        # Its own words are escaped there.
        yield namespace or "everybody", Markup(notebook.page(handle.server, handle.stats()))


_TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{% if every %}<meta http-equiv="refresh" content="{{ every }}">{% endif %}
<title>{{ model }} · prefix cache</title>
<style>
:root { color-scheme: light dark; --line: light-dark(#c9ced6, #454c57); --link: light-dark(#0a4fb3, #8ab8ff) }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 1rem;
       background: light-dark(#fff, #15181d); color: light-dark(#1b1f24, #e8ebef) }
h1 { font-size: 1.4rem; margin: 0 0 .25rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
a { color: var(--link) } a:focus-visible, summary:focus-visible, .wide:focus-visible { outline: 3px solid var(--link) }
.skip { position: absolute; left: -99rem } .skip:focus { left: 1rem; top: .5rem }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .75rem; margin: 1rem 0 }
dl div { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem }
dt { font-size: .875rem } dd { margin: 0; font-weight: 600; overflow-wrap: anywhere }
.wide { overflow-x: auto } table { border-collapse: collapse; min-width: 100% }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top }
th { white-space: nowrap } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .5rem 0; padding: .5rem .75rem }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere }
details code { overflow-wrap: anywhere; white-space: pre-wrap }
</style>
</head>
<body>
<a class="skip" href="#main">Skip to the figures</a>
<header>
<h1>{{ model }}</h1>
<p>Prefix cache, {{ mode }} mode. As of {{ now }}.
<a href="/">Look again</a> ·
{% if every %}<a href="/">stop looking every {{ every }} seconds</a>
{% else %}<a href="/?every=5">look every 5 seconds</a>{% endif %}
· <a href="/metrics">figures for Prometheus</a></p>
</header>
<main id="main">
<dl>
{% for name, value in figures %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% macro requests(title, rows, nothing) %}
<h2>{{ title }}</h2>
{% if rows %}
<div class="wide" tabindex="0" role="region" aria-label="{{ title }}">
<table>
<thead><tr><th scope="col">endpoint</th><th scope="col">tenant</th><th scope="col">state</th>
<th scope="col" class="n">prompt</th><th scope="col" class="n">cached</th>
<th scope="col" class="n">first token, s</th><th scope="col" class="n">tokens</th>
<th scope="col" class="n">all, s</th><th scope="col">reuse</th></tr></thead>
<tbody>
{% for row in rows %}
<tr><td>{{ row.endpoint }}</td><td>{{ row.namespace }}</td><td>{{ row.state }}</td><td class="n">{{ row.prompt }}</td>
<td class="n">{{ row.cached }}</td><td class="n">{{ row.first }}</td><td class="n">{{ row.tokens }}</td>
<td class="n">{{ row.seconds }}</td><td>{{ row.why }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% else %}<p>{{ nothing }}</p>{% endif %}
{% endmacro %}
{{ requests("Being answered", live, "Nobody asks at the moment.") }}
{{ requests("Answered lately", recent, "Nothing was asked yet.") }}
<h2>What was not reused, and what would help</h2>
{% if misses %}
<div class="wide" tabindex="0" role="region" aria-label="Misses">
<table>
<thead><tr><th scope="col" class="n">prompts</th><th scope="col">reason, as last told</th>
<th scope="col">what helps</th></tr></thead>
<tbody>
{% for reason, count, help in misses %}
<tr><td class="n">{{ "{:,}".format(count) }}</td><td>{{ reason }}</td><td>{{ help or "nothing is lost" }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% else %}<p>Every prompt resumed from something.</p>{% endif %}
<h2>Stored prefixes</h2>
{% for name, tree in trees %}
<details{% if loop.first %} open{% endif %}><summary>{{ name }}</summary><div class="wide" tabindex="0" role="region"
aria-label="Prefixes of {{ name }}">{{ tree }}</div></details>
{% endfor %}
</main>
</body>
</html>
"""
)
