// The parts of the page that Gradio has no component for: pictures that are chosen, painted on and sent as text, so
// that nothing is uploaded to a file; keys; the theme's button. Loaded once; `window.kandinskyPage` is its interface.
(() => {
  "use strict";
  if (window.kandinskyPage) return;

  // Pictures --------------------------------------------------------------------------------------------------------

  const announce = (element, text, isFault = false) => {
    const line = element.querySelector(".kj-note");
    if (!line) return;
    line.textContent = text;
    line.classList.toggle("kj-fault", isFault);
  };

  const readAsText = (file) =>
    new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(file);
    });

  const firstImage = (transfer) => Array.from(transfer?.files ?? []).find((file) => file.type.startsWith("image/"));

  async function bitmapOf(source) {
    if (typeof source !== "string") return createImageBitmap(source);
    const image = new Image();
    image.src = source; // a data: URL
    await image.decode();
    return image;
  }

  function takeFiles(element, take) {
    const input = element.querySelector("input[type=file]");
    const takeChosen = () => {
      if (input.files[0]) take(input.files[0]);
      input.value = "";
    };
    input.addEventListener("change", takeChosen);
    takeChosen(); // what was chosen before this ran
    const over = (on) => element.firstElementChild.classList.toggle("kj-over", on);
    element.addEventListener("dragover", (event) => {
      event.preventDefault();
      event.stopPropagation();
      over(true);
    });
    element.addEventListener("dragleave", () => over(false));
    element.addEventListener("drop", (event) => {
      event.preventDefault();
      event.stopPropagation();
      over(false);
      const file = firstImage(event.dataTransfer);
      if (file) take(file);
      else announce(element, "That is not a picture.", true);
    });
    element.addEventListener("paste", (event) => {
      const file = firstImage(event.clipboardData);
      if (file) take(file);
    });
  }

  // A picture, and with `paint` a mask on it. The value is "", or JSON with data: URLs: {"picture", "mask"}.
  function picture(element, props, watch, paint, side) {
    const find = (selector) => element.querySelector(selector);
    const canvas = find(".kj-image");
    const stage = find(".kj-stage");
    const painter = paint ? mask(element, send) : null;
    let url = "";

    function send() {
      props.value = url ? JSON.stringify({ picture: url, mask: painter ? painter.url() : "" }) : "";
    }

    async function show(source, maskUrl) {
      let bitmap;
      try {
        bitmap = await bitmapOf(source);
      } catch {
        const kept = url ? " The one above is kept." : "";
        announce(element, `This file cannot be read as a picture.${kept}`, true);
        return false;
      }
      const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
      canvas.width = Math.max(1, Math.round(bitmap.width * scale));
      canvas.height = Math.max(1, Math.round(bitmap.height * scale));
      canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      url = canvas.toDataURL("image/png");
      stage.hidden = false;
      stage.style.width = `${Math.max(320, canvas.width)}px`;
      find(".kj-remove").hidden = false;
      element.firstElementChild.classList.add("kj-filled");
      announce(element, `${canvas.width} x ${canvas.height} pixels.`);
      if (painter) await painter.reset(canvas.width, canvas.height, maskUrl);
      return true;
    }

    function clear() {
      url = "";
      stage.hidden = true;
      find(".kj-remove").hidden = true;
      element.firstElementChild.classList.remove("kj-filled");
      announce(element, "");
    }

    takeFiles(element, async (file) => (await show(file)) && send());
    find(".kj-remove").addEventListener("click", () => {
      clear();
      send();
      find("input[type=file]").focus();
    });
    async function refresh() {
      if (!props.value) return clear();
      const given = JSON.parse(props.value);
      if (given.picture !== url) await show(given.picture, given.mask);
    }
    watch("value", refresh);
    refresh(); // a tab's parts are made when it is first shown
  }

  // Painting: strokes on a transparent canvas over the picture, by mouse, finger, pen or keys.
  const COLOUR = "#7c3aed"; // of the mask; it is sent white on black

  // Paint a canvas where it has alpha: in one colour, on another.
  function recolour(canvas, colour, ground) {
    const paper = canvas.getContext("2d");
    paper.globalCompositeOperation = "source-in";
    paper.fillStyle = colour;
    paper.fillRect(0, 0, canvas.width, canvas.height);
    paper.globalCompositeOperation = "destination-over";
    paper.fillStyle = ground;
    paper.fillRect(0, 0, canvas.width, canvas.height);
  }

  function mask(element, changed) {
    const find = (selector) => element.querySelector(selector);
    const canvas = find(".kj-mask");
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const size = find(".kj-brush");
    const eraser = find(".kj-eraser");
    const ring = find(".kj-ring");
    const past = [];
    let last = null;
    let at = [0, 0];

    const width = () => (Number(size.value) / 100) * Math.max(canvas.width, canvas.height);
    const erasing = () => eraser.getAttribute("aria-pressed") === "true";

    function keep() {
      past.push(context.getImageData(0, 0, canvas.width, canvas.height));
      if (past.length > 12) past.shift();
    }

    function stroke(from, to) {
      context.globalCompositeOperation = erasing() ? "destination-out" : "source-over";
      context.strokeStyle = COLOUR;
      context.lineCap = "round";
      context.lineWidth = width();
      context.beginPath();
      context.moveTo(...from);
      context.lineTo(to[0] + 0.01, to[1]);
      context.stroke();
      context.globalCompositeOperation = "source-over";
    }

    function moveRing(point) {
      const scale = canvas.clientWidth / canvas.width;
      at = point;
      ring.style.width = ring.style.height = `${width() * scale}px`;
      ring.style.left = `${point[0] * scale}px`;
      ring.style.top = `${point[1] * scale}px`;
    }

    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [
        ((event.clientX - box.left) * canvas.width) / box.width,
        ((event.clientY - box.top) * canvas.height) / box.height,
      ];
    };

    canvas.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      canvas.focus({ preventScroll: true });
      canvas.setPointerCapture(event.pointerId);
      keep();
      last = place(event);
      stroke(last, last);
    });
    canvas.addEventListener("pointermove", (event) => {
      const point = place(event);
      moveRing(point);
      if (last === null) return;
      stroke(last, point);
      last = point;
    });
    const lift = () => {
      if (last === null) return;
      last = null;
      changed();
    };
    canvas.addEventListener("pointerup", lift);
    canvas.addEventListener("pointercancel", lift);

    canvas.addEventListener("keydown", (event) => {
      const step = Math.max(1, width() / 4);
      const move = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
      const stamp = event.key === " ";
      if (!move && !stamp) return;
      event.preventDefault();
      const to = move
        ? [Math.min(canvas.width, Math.max(0, at[0] + move[0])), Math.min(canvas.height, Math.max(0, at[1] + move[1]))]
        : at;
      if (stamp || event.shiftKey) {
        keep();
        stroke(at, to);
        changed();
      }
      moveRing(to);
    });

    size.addEventListener("input", () => moveRing(at));
    eraser.addEventListener("click", () => eraser.setAttribute("aria-pressed", String(!erasing())));
    find(".kj-undo").addEventListener("click", () => {
      if (!past.length) return;
      context.putImageData(past.pop(), 0, 0);
      changed();
    });
    find(".kj-wipe").addEventListener("click", () => {
      keep();
      context.clearRect(0, 0, canvas.width, canvas.height);
      changed();
    });
    find(".kj-invert").addEventListener("click", () => {
      keep();
      context.globalCompositeOperation = "source-out";
      context.fillStyle = COLOUR;
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.globalCompositeOperation = "source-over";
      changed();
    });

    return {
      async reset(w, h, maskUrl) {
        canvas.width = w;
        canvas.height = h;
        past.length = 0;
        moveRing([w / 2, h / 2]);
        if (!maskUrl) return;
        context.drawImage(await bitmapOf(maskUrl), 0, 0, w, h);
        const pixels = context.getImageData(0, 0, w, h);
        for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i]; // black is transparent
        context.putImageData(pixels, 0, 0);
        context.globalCompositeOperation = "source-in";
        context.fillStyle = COLOUR;
        context.fillRect(0, 0, w, h);
        context.globalCompositeOperation = "source-over";
      },
      url() {
        const out = document.createElement("canvas");
        out.width = canvas.width;
        out.height = canvas.height;
        out.getContext("2d").drawImage(canvas, 0, 0);
        recolour(out, "#fff", "#000");
        return out.toDataURL("image/png");
      },
    };
  }

  // A file whose settings are restored: its bytes as they are, for its metadata.
  function restore(element, props, trigger) {
    const limit = Number(element.firstElementChild.dataset.limit);
    async function take(file) {
      if (file.size > limit) return announce(element, `This file is larger than ${Math.floor(limit / 2 ** 20)} MiB.`, true);
      announce(element, "");
      props.value = await readAsText(file);
      trigger("upload");
      scrollTo(".kj-header"); // where the answer is shown
    }
    takeFiles(element, take);
    // What is dropped elsewhere on the page is restored too.
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      const file = firstImage(event.dataTransfer);
      if (file) take(file);
      else if (event.dataTransfer?.files.length) {
        announce(element, "That is not a picture.", true);
        scrollTo("#kj-restore");
      }
    });
  }

  function gallery(element, trigger) {
    element.addEventListener("click", (event) => {
      const thumb = event.target.closest("button[data-number]");
      if (thumb) trigger("select", { number: Number(thumb.dataset.number) });
    });
  }

  // Keys and theme --------------------------------------------------------------------------------------------------

  const shown = (element) => element && element.offsetParent !== null;
  let isWired = false; // whether Gradio listens to the buttons
  let pressed = false; // before that
  function wired() {
    isWired = true;
    stored.set(KEY, null);
    if (pressed) Array.from(document.querySelectorAll(".kj-generate")).find(shown)?.click();
    pressed = false;
  }

  const running = () => document.querySelector("#kj-result [data-running=true]") !== null;

  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      const button = Array.from(document.querySelectorAll(".kj-generate")).find(shown);
      if (!button && isWired) return;
      event.preventDefault();
      event.stopPropagation();
      document.activeElement?.dispatchEvent(new Event("change", { bubbles: true }));
      if (isWired) setTimeout(() => button.click(), 0);
      else pressed = true;
    } else if (event.key === "Escape" && running()) {
      document.querySelector("#kj-cancel")?.click();
    }
  }, true);

  document.addEventListener("focusin", (event) => {
    if (event.target.closest?.(".kj-number")) event.target.inputMode = "decimal"; // a phone's keyboard
    if (event.target.matches?.("#kj-size input")) { // what is typed replaces what is there
      const all = () => event.target.select();
      setTimeout(all, 0);
      event.target.addEventListener("pointerup", () => setTimeout(all, 0), { once: true });
    }
  });

  const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
  const scrollTo = (selector) =>
    document.querySelector(selector)?.scrollIntoView({ behavior: calm() ? "auto" : "smooth", block: "start" });
  document.addEventListener("click", (event) => {
    const on = (selector) => event.target.closest?.(selector);
    if (on(".kj-generate, .kj-grid-button")) {
      const box = document.querySelector("#kj-result").getBoundingClientRect();
      if (box.top < 0 || box.top + 160 > innerHeight) scrollTo("#kj-result");
    }
    if (on("#kj-cancel") && on("#kj-cancel").contains(document.activeElement)) {
      Array.from(document.querySelectorAll(".kj-generate")).find(shown)?.focus({ preventScroll: true });
    }
    if (on("#kj-use, #kj-repaint, #kj-reuse")) scrollTo(".kj-header");
  });

  function header(element) {
    document.documentElement.lang = "en";
    const button = element.querySelector(".kj-theme");
    const isDark = () => document.body.classList.contains("dark");
    let chosen = null;
    try {
      chosen = localStorage.getItem("kandinsky-theme");
    } catch {} // a frame that may not store anything
    function dress() {
      if (chosen) document.body.classList.toggle("dark", chosen === "dark"); // Gradio follows the system
      document.documentElement.classList.toggle("kj-dark", isDark());
      button.textContent = isDark() ? "Light" : "Dark"; // what a click gives
    }
    button.addEventListener("click", () => {
      chosen = isDark() ? "light" : "dark";
      dress();
      try {
        localStorage.setItem("kandinsky-theme", chosen);
      } catch {}
    });
    new MutationObserver(dress).observe(document.body, { attributeFilter: ["class"] });
    dress();
    watchServer(element);
  }

  // The server ------------------------------------------------------------------------------------------------------

  const LOOK = 2000; // ms between two looks whether it is there
  const MISSES = 2; // one after the other, until it is lost
  const NEWS = "kandinsky-news"; // what a page says that was loaded again, as Gradio does once a lost server is back
  const AWAY = "The connection to the server was lost. What ran then is lost, and so is the gallery if the server was " +
    "started anew. Settings and source pictures have to be given again.";
  let lost = false;

  const stored = {
    get(name) {
      try {
        return sessionStorage.getItem(name);
      } catch {
        return null; // a frame that may not store anything
      }
    },
    set(name, text) {
      try {
        if (text === null) sessionStorage.removeItem(name);
        else sessionStorage.setItem(name, text);
      } catch {}
    },
  };

  function watchServer(element) {
    const line = document.createElement("p");
    line.setAttribute("role", "alert");
    line.className = "kj-news";
    element.append(line);
    const say = (text, wrong) => {
      if (line.textContent === text) return;
      line.className = `kj-news ${wrong ? "kj-error" : "kj-notice"}`;
      line.textContent = text;
    };
    if (stored.get(NEWS)) say(stored.get(NEWS), false);
    stored.set(NEWS, null);
    let started = null;
    let misses = 0;

    function lose() {
      lost = true;
      say("The connection to the server is lost; it may have been stopped. This page looks for it again and again.", true);
      stored.set(NEWS, AWAY);
      if (line.getBoundingClientRect().bottom < 0) scrollTo(".kj-header");
      const result = document.querySelector("#kj-result [data-running=true]");
      if (!result) return;
      result.dataset.running = "false";
      result.querySelector(".kj-status").textContent = "The connection was lost.";
      result.querySelector(".kj-bar")?.remove();
    }

    function found(state) {
      if (lost) {
        if (started !== null && state.started !== started) {
          location.reload(); // which says what was lost; the old page knows nothing of the new server
          return;
        }
        say("The server is there again.", false);
        stored.set(NEWS, null);
      } else if (state.stopping) {
        say("The server is stopping. It finishes what runs, and takes nothing new.", false);
        for (const image of document.querySelectorAll(".kj-thumb img")) image.loading = "eager"; // while it is there
      }
      lost = false;
      started = state.started;
    }

    async function look() {
      let state = null;
      try {
        const answer = await fetch("own/state", { cache: "no-store", signal: AbortSignal.timeout(5000) });
        if (answer.ok) state = await answer.json();
      } catch {} // nobody answers
      misses = state === null ? misses + 1 : 0;
      if (state !== null) found(state);
      else if (misses >= MISSES && !lost) lose();
    }
    look(); // at once: a server that ends soon after is known by then
    setInterval(() => document.hidden || look(), LOOK);
  }

  // Gradio has words of its own for an event that nobody takes, over the page's parts.
  document.addEventListener("click", (event) => {
    if (!lost || !event.target.closest?.(".kj-generate, .kj-grid-button, .kj-thumb, .kj-row button")) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    scrollTo(".kj-header");
  }, true);

  // The session's key is kept over a reload, and only then: a tab that is duplicated has a gallery of its own.
  const KEY = "kandinsky-session";
  addEventListener("pagehide", () => {
    const key = document.querySelector("#kj-gallery [data-key]")?.dataset.key;
    if (key) stored.set(KEY, key);
  });
  addEventListener("pageshow", (event) => {
    if (event.persisted) stored.set(KEY, null);
  });

  window.kandinskyPage = { picture, restore, gallery, header, wired };
})();
