"use strict";
(() => {
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const darkOf = JSON.parse(document.getElementById("dark").textContent);
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axisOf = {}; // task -> the axis its curves are drawn against

  // A copy with every light colour replaced by its counterpart for the present scheme.
  const inScheme = (value) => {
    if (typeof value === "string") return scheme.matches && darkOf[value] ? darkOf[value] : value;
    if (Array.isArray(value)) return value.map(inScheme);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, inScheme(item)]));
    }
    return value;
  };

  const axis = (given) => ({
    gridcolor: token("--grid"), linecolor: token("--rule"), zerolinecolor: token("--rule"), ...given,
  });

  const draw = (id) => {
    const spec = inScheme(specs[id]);
    const chosen = spec.abscissas[axisOf[id.split("-")[0]] || "step"];
    const layout = {
      ...spec.layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: token("--ink") },
      hoverlabel: { ...spec.layout.hoverlabel, bgcolor: token("--panel"), bordercolor: token("--rule"),
        font: { color: token("--ink") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: token("--soft"), activecolor: token("--accent") },
    };
    for (const name of ["xaxis", "yaxis"]) if (spec.layout[name]) layout[name] = axis(spec.layout[name]);
    if (chosen && spec.abscissas.step) {
      layout.xaxis.title = { text: chosen[0] };
      spec.data.forEach((trace, place) => { trace.x = chosen[1][place]; });
    }
    const place = document.getElementById(id);
    place.dataset.drawn = "yes";
    return Plotly.react(place, spec.data, layout, {
      displaylogo: false, plotlyServerURL: "",
      // Named one by one: the default set can grow buttons that send the data elsewhere.
      modeBarButtons: [spec.layout.xaxis ? ["zoom2d", "pan2d", "resetScale2d", "toImage"] : ["toImage"]],
    });
  };

  // Figures are drawn when they come near the screen: a page of many runs opens at once.
  const seen = new IntersectionObserver((changes) => {
    for (const change of changes) {
      if (change.isIntersecting && !change.target.dataset.drawn) draw(change.target.id);
    }
  }, { rootMargin: "600px" });
  document.querySelectorAll(".plot").forEach((place) => seen.observe(place));
  const resized = new ResizeObserver((changes) => {
    for (const { target } of changes) if (target.dataset.drawn && target.offsetParent) Plotly.Plots.resize(target);
  });
  document.querySelectorAll(".plot").forEach((place) => resized.observe(place));
  const redraw = (ids) => ids.filter((id) => document.getElementById(id).dataset.drawn).forEach(draw);
  const paint = () => {
    document.querySelectorAll("[data-color]").forEach((key) => { key.style.background = inScheme(key.dataset.color); });
    document.querySelectorAll("[data-ink]").forEach((key) => { key.style.color = inScheme(key.dataset.ink); });
  };
  paint();
  scheme.addEventListener("change", () => { redraw(Object.keys(specs)); paint(); });
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll(".plot").forEach((place) => { if (place.offsetParent) draw(place.id); });
  });

  document.querySelectorAll(".choice[data-task] button").forEach((button) => {
    button.addEventListener("click", () => {
      const task = button.parentElement.dataset.task;
      axisOf[task] = button.dataset.axis;
      button.parentElement.querySelectorAll("button").forEach((other) => {
        other.setAttribute("aria-pressed", String(other === button));
      });
      redraw([`${task}-loss`, `${task}-accuracy`].filter((id) => specs[id]));
    });
  });

  document.querySelectorAll("select[data-runs]").forEach((picker) => {
    picker.addEventListener("change", () => {
      for (const option of picker.options) {
        document.getElementById(option.value).hidden = option.value !== picker.value;
      }
    });
  });
})();
