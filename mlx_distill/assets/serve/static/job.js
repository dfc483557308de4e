// The curves and the events of a job's page. Without this script the page shows both as they are when it is loaded.
"use strict";
(() => {
  const MAX_POINTS = 4000, MAX_EVENTS = 300;
  const live = document.getElementById("live");
  const box = document.getElementById("curves");
  const log = document.getElementById("events");
  const curves = new Map();
  const [STEP, SECONDS, LOSS, VALID] = [0, 1, 2, 3];

  // The centred moving mean over a twentieth of the points, as in the report.
  function smoothed(values) {
    const radius = Math.floor(values.length / 40), sums = [0];
    for (const value of values) sums.push(sums[sums.length - 1] + (value ?? 0));
    return values.map((value, i) => {
      if (value == null) return null;
      const r = Math.min(radius, i, values.length - 1 - i);
      return (sums[i + r + 1] - sums[i - r]) / (2 * r + 1);
    });
  }

  function clock(seconds) {
    const whole = Math.round(seconds), pad = (n) => String(n).padStart(2, "0");
    const minutes = Math.floor(whole / 60) % 60, hours = Math.floor(whole / 3600);
    return hours ? `${hours}:${pad(minutes)}:${pad(whole % 60)}` : `${minutes}:${pad(whole % 60)}`;
  }

  const significant = (value, digits = 3) => value == null ? "–" : String(Number(value.toPrecision(digits)));

  class Curve {
    constructor(figure, byTime, log) {
      Object.assign(this, {figure, byTime, log, points: [], stride: 1, plot: null, due: false});
      this.place = figure.querySelector(".plot");
      new ResizeObserver(() => this.plot?.setSize({width: this.place.clientWidth, height: this.height()})).observe(this.place);
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { this.plot?.destroy(); this.plot = null; this.draw(); });
    }

    height() { return Math.max(200, Math.min(320, Math.round(this.place.clientWidth * .45))); }

    add({stride, whole, points}) {
      this.stride = stride;
      const last = this.points.length && !whole ? this.points[this.points.length - 1][STEP] : 0;
      this.points = whole ? points : this.points.concat(points.filter((point) => point[STEP] > last));
      while (this.points.length > MAX_POINTS)
        this.points = this.points.filter((point, i) => i % 2 === 0 || point[VALID] != null || i === this.points.length - 1);
      this.figure.dataset.last = this.points.length ? this.points[this.points.length - 1][STEP] : 0;
      this.figure.dataset.points = this.points.length;
      if (!this.due) { this.due = true; requestAnimationFrame(() => { this.due = false; this.draw(); }); }
    }

    data() {
      const points = this.byTime ? this.points.filter((point) => point[SECONDS] != null) : this.points;
      const shown = (value) => (this.log && !(value > 0) ? null : value);
      const losses = points.map((point) => shown(point[LOSS]));
      return [points.map((point) => point[this.byTime ? SECONDS : STEP]), losses, smoothed(losses), points.map((point) => shown(point[VALID]))];
    }

    draw() {
      const data = this.data();
      if (!data[0].length) return;
      if (this.plot) this.plot.setData(data);
      else this.plot = this.made(data);
    }

    made(data) {
      const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
      const ink = colour("--ink"), soft = colour("--soft"), line = colour("--line");
      const axis = {stroke: soft, grid: {stroke: line, width: 1}, ticks: {stroke: line, width: 1}, font: "11px " + colour("--sans")};
      const shown = (u, value) => significant(value);
      this.place.replaceChildren();
      return new uPlot({
        width: this.place.clientWidth, height: this.height(),
        scales: {x: {time: false}, y: this.log ? {distr: 3} : {}},
        cursor: {drag: {x: true, y: false}, points: {size: 6}},
        axes: [
          {...axis, values: this.byTime ? (u, splits) => splits.map(clock) : (u, splits) => splits.map((value) => Number.isInteger(value) ? value.toLocaleString("en") : "")},
          {...axis, size: 52, values: (u, splits) => splits.map((value) => value == null ? "" : significant(value))},
        ],
        series: [
          {label: this.byTime ? "time" : "step", value: (u, value) => value == null ? "–" : this.byTime ? clock(value) : value.toLocaleString("en")},
          {label: "loss", stroke: soft + "88", width: 1, points: {show: false}, spanGaps: true, value: shown},
          {label: "smoothed", stroke: ink, width: 2.2, points: {show: false}, spanGaps: true, value: shown},
          {label: "validation", stroke: colour("--quantized"), width: 1.4, dash: [5, 4], spanGaps: true, points: {show: true, size: 6, fill: colour("--paper")}, value: shown},
        ],
      }, data, this.place);
    }
  }

  function curveOf(name) {
    if (!curves.has(name)) {
      let figure = box.querySelector(`figure[data-training="${CSS.escape(name)}"]`);
      if (!figure) {
        figure = document.getElementById("new-curve").content.firstElementChild.cloneNode(true);
        figure.dataset.training = name;
        figure.querySelector("b").textContent = name;
        box.prepend(figure);
      }
      box.hidden = false;
      curves.set(name, new Curve(figure, box.dataset.x === "time", box.dataset.y === "log"));
    }
    return curves.get(name);
  }

  function addEvent(event) {
    if (log.querySelector(`li[data-id="${event.id}"]`)) return;
    const item = document.getElementById("new-event").content.firstElementChild.cloneNode(true);
    item.dataset.id = event.id;
    item.classList.add(event.level);
    const time = item.querySelector("time"), text = item.querySelector("span");
    time.textContent = event.time;
    text.textContent = event.message;
    item.querySelector("em").textContent = event.level === "info" ? "" : event.level === "warn" ? "warning" : event.level;
    log.prepend(item);
    while (log.childElementCount > MAX_EVENTS) log.lastElementChild.remove();
  }

  // A lost connection is shown, and made anew: after an error by htmx, where nothing is heard any more from here.
  function watchConnection() {
    const lost = document.getElementById("connection");
    let connection = null, ended = false, heard = Date.now();
    const hear = () => { heard = Date.now(); };
    document.addEventListener("htmx:sse:after:connection", (event) => { connection = event.detail.connection; lost.hidden = true; hear(); });
    document.addEventListener("htmx:sse:after:message", hear);
    document.addEventListener("htmx:sse:error", () => { lost.hidden = false; });
    document.addEventListener("htmx:sse:close", (event) => { ended = event.detail.reason === "message"; });
    document.addEventListener("visibilitychange", hear); // a page that nobody sees is not connected
    setInterval(() => {
      if (ended || document.hidden || Date.now() - heard < 1000 * live.dataset.silent) return;
      lost.hidden = false;
      hear();
      if (connection?.reader) connection.reader.cancel();
      else htmx.trigger(live, "job-connect"); // where the first connection failed
    }, 1000);
  }

  if (box) for (const data of JSON.parse(box.dataset.points)) curveOf(data.training).add(data);
  if (live) {
    live.addEventListener("job-points", (event) => { const data = JSON.parse(event.detail.data); curveOf(data.training).add(data); });
    live.addEventListener("job-log", (event) => addEvent(JSON.parse(event.detail.data)));
    if (live.dataset.silent) watchConnection();
  }
})();
