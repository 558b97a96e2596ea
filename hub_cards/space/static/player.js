// The player: several versions of one clip, of which one is heard; switching keeps the instant.
(() => {
  const lives = new WeakMap(); // of each root: what ends its listeners, for Gradio puts new clips into old elements
  const clock = (s) => `${Math.floor(s / 60)}:${(s % 60).toFixed(1).padStart(4, "0")}`;

  function start(root) {
    lives.get(root)?.abort();
    const life = new AbortController();
    const { signal } = life;
    lives.set(root, life);
    const facts = JSON.parse(root.dataset.facts);
    const sounds = [...root.querySelectorAll("audio")];
    const buttons = [...root.querySelectorAll(".tracks button")];
    const strips = root.querySelector(".strips");
    const line = root.querySelector(".line");
    const playing = () => !sounds[chosen].paused;
    let chosen = facts.chosen;

    function choose(next) {
      const was = playing();
      const instant = sounds[chosen].currentTime;
      sounds[chosen].pause();
      chosen = next;
      sounds[chosen].currentTime = instant;
      if (was) sounds[chosen].play();
      buttons.forEach((button, index) => button.setAttribute("aria-checked", index === chosen));
      root.dataset.track = chosen;
      if (!strips) return;
      strips.querySelector(".chosen img").src = facts.spectra[chosen];
      strips.querySelector(".chosen figcaption").textContent = buttons[chosen].querySelector("b").textContent;
      const unheard = facts.levels[chosen] === null ? 0 : 1 - facts.levels[chosen] / facts.codebooks;
      strips.querySelector(".codes i").style.height = `${100 * unheard}%`;
    }

    function toggle() {
      if (playing()) return sounds[chosen].pause();
      document.querySelectorAll(".mimi-player audio").forEach((other) => other.pause());
      sounds[chosen].play();
    }

    function draw() {
      if (signal.aborted || !root.isConnected) return sounds.forEach((sound) => sound.pause());
      const { currentTime, duration } = sounds[chosen];
      root.classList.toggle("playing", playing());
      root.querySelector(".time").textContent = `${clock(currentTime)} / ${clock(duration || 0)}`;
      if (line) line.style.left = `${(100 * currentTime) / (duration || 1)}%`;
      requestAnimationFrame(draw);
    }

    root.querySelector(".play").addEventListener("click", toggle, { signal });
    buttons.forEach((button, index) => button.addEventListener("click", () => choose(index), { signal }));
    root.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      choose((chosen + step + sounds.length) % sounds.length);
      buttons[chosen].focus();
      event.preventDefault();
    }, { signal });
    strips?.addEventListener("click", (event) => {
      const box = strips.getBoundingClientRect();
      sounds[chosen].currentTime = ((event.clientX - box.left) / box.width) * (sounds[chosen].duration || 0);
    }, { signal });
    choose(chosen);
    draw();
  }

  const look = () =>
    document.querySelectorAll(".mimi-player:not([data-track])").forEach((root) => {
      root.dataset.track = "";
      start(root);
    });
  new MutationObserver(look).observe(document, { childList: true, subtree: true });
})();
