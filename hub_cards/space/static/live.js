// Live: the microphone to the server in frames, what the codec makes of it back to the ear, and how long that took.
(() => {
  const RATE = 24000;
  const FRAME = 1920;
  const FRAME_MS = (1000 * FRAME) / RATE;
  const LATE = 6; // frames under way that say that the codec does not keep up

  const WORKLET = `
    registerProcessor("capture", class extends AudioWorkletProcessor {
      constructor() { super(); this.frame = new Int16Array(${FRAME}); this.filled = 0; }
      process([[samples]]) {
        for (const sample of samples ?? []) {
          this.frame[this.filled++] = 32767 * Math.max(-1, Math.min(1, sample));
          if (this.filled === ${FRAME}) {
            this.port.postMessage(this.frame.slice());
            this.filled = 0;
          }
        }
        return true;
      }
    });
    registerProcessor("playback", class extends AudioWorkletProcessor {
      constructor() {
        super();
        this.waiting = []; this.at = 0; this.begun = false;
        this.port.onmessage = ({ data }) => this.waiting.push(data);
      }
      process(_, [[out]]) {
        this.begun ||= this.waiting.length > 1; // a frame in hand, against the network's unrest
        for (let i = 0; this.begun && i < out.length; i++) {
          if (!this.waiting.length) { this.begun = false; break; }
          out[i] = this.waiting[0][this.at++] / 32768;
          if (this.at === this.waiting[0].length) { this.waiting.shift(); this.at = 0; }
        }
        return true;
      }
    });`;

  const middle = (values, share) => [...values].sort((a, b) => a - b)[Math.floor(share * (values.length - 1))];

  async function start(root, say) {
    const media = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: true, noiseSuppression: false, autoGainControl: false },
    });
    const context = new AudioContext({ sampleRate: RATE });
    const url = URL.createObjectURL(new Blob([WORKLET], { type: "text/javascript" }));
    await context.audioWorklet.addModule(url);
    const capture = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0 });
    const playback = new AudioWorkletNode(context, "playback", { numberOfInputs: 0, outputChannelCount: [1] });
    const level = new AnalyserNode(context, { fftSize: 2048 });
    playback.connect(level).connect(context.destination);

    const codebooks = root.querySelector("select").value;
    const place = new URL(`live?codebooks=${codebooks}`, root.dataset.base || location.href);
    place.protocol = place.protocol.replace("http", "ws");
    const socket = new WebSocket(place);
    socket.binaryType = "arraybuffer";
    const sent = [];
    const spent = [];
    const trips = [];
    let received = 0;
    let refused = "";

    capture.port.onmessage = ({ data }) => {
      if (socket.readyState !== WebSocket.OPEN) return;
      sent.push(performance.now());
      socket.send(data.buffer);
      if (sent.length - received > LATE) say("late", "It does not keep up: frames wait. Take fewer codebooks, or a faster machine.");
    };
    socket.onmessage = ({ data }) => {
      if (data instanceof ArrayBuffer) return playback.port.postMessage(new Int16Array(data));
      const facts = JSON.parse(data);
      if (facts.error) return void (refused = facts.error);
      trips.push(performance.now() - sent[received]);
      received += facts.frames;
      spent.push(facts.ms / facts.frames);
      [trips, spent].forEach((values) => values.length > 100 && values.shift());
      const samples = new Float32Array(level.fftSize);
      level.getFloatTimeDomainData(samples);
      const loudness = Math.sqrt(samples.reduce((sum, x) => sum + x * x, 0) / samples.length);
      root.dataset.frames = received;
      root.dataset.loudness = Math.max(Number(root.dataset.loudness || 0), loudness).toFixed(4);
      const show = (name, text) => (root.querySelector(`[data-fact=${name}]`).textContent = text);
      root.querySelector(".meter i").style.width = `${Math.min(100, 300 * loudness)}%`;
      show("codec", `${middle(spent, 0.5).toFixed(1)} ms (p95 ${middle(spent, 0.95).toFixed(1)})`);
      show("delay", `${(FRAME_MS + middle(trips, 0.5)).toFixed(0)} ms`);
      show("speed", `${(FRAME_MS / middle(spent, 0.5)).toFixed(1)} × real time`);
      show("sent", `${((received * codebooks * 11) / 8 / 1000).toFixed(2)} kB`);
      if (sent.length - received <= 2) say("on", "Speak. What you hear went through the codec.");
    };
    const ended = new Promise((resolve) => (socket.onclose = resolve));
    new MediaStreamAudioSourceNode(context, { mediaStream: media }).connect(capture);
    const stop = () => socket.close();
    ended.then(() => {
      media.getTracks().forEach((track) => track.stop());
      context.close();
      URL.revokeObjectURL(url);
      say("off", refused || "Press the button and speak; headphones keep the codec from hearing itself.");
    });
    return stop;
  }

  function prepare(root) {
    const button = root.querySelector("button");
    let stop = null;
    const say = (state, text) => {
      root.dataset.state = state;
      root.querySelector(".state").textContent = text;
      if (state === "off") stop = null;
      button.textContent = stop ? "Stop" : "Speak";
    };
    button.addEventListener("click", async () => {
      if (stop) return stop();
      say("wait", "Asking for the microphone …");
      try {
        stop = await start(root, say);
        say("on", "Speak. What you hear went through the codec.");
      } catch (error) {
        say("off", `There is no microphone for this page: ${error.message}.`);
      }
    });
    root.querySelector("select").addEventListener("change", () => stop && stop());
  }

  const look = () =>
    document.querySelectorAll(".mimi-live:not([data-state])").forEach((root) => {
      root.dataset.state = "off";
      prepare(root);
    });
  new MutationObserver(look).observe(document, { childList: true, subtree: true });
})();
