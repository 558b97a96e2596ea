// Live: the microphone to the server in small pieces, what the codec makes of it back to the ear, and how long that
// took. The microphone keeps its own rate, which the server is told: Firefox resamples no microphone.
(() => {
  const RATE = 24000;
  const FRAME_MS = 80;
  const PIECE_MS = 20; // short, so that a frame does not wait for the end of a piece
  const LATE = 6; // frames under way that say that the codec does not keep up

  const WORKLET = `
    registerProcessor("capture", class extends AudioWorkletProcessor {
      constructor({ processorOptions }) {
        super();
        this.piece = new Int16Array(processorOptions.samples);
        this.filled = 0;
      }
      process([[samples]]) {
        for (const sample of samples ?? []) {
          this.piece[this.filled++] = 32767 * Math.max(-1, Math.min(1, sample));
          if (this.filled === this.piece.length) {
            this.port.postMessage(this.piece.slice());
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
    const [ear, mouth] = [new AudioContext({ sampleRate: RATE }), new AudioContext()];
    [ear, mouth].forEach((context) => context.resume()); // asked for late, for the permission came between
    const url = URL.createObjectURL(new Blob([WORKLET], { type: "text/javascript" }));
    await Promise.all([ear, mouth].map((context) => context.audioWorklet.addModule(url)));
    const piece = Math.round((mouth.sampleRate * PIECE_MS) / 1000);
    const frame = (mouth.sampleRate * FRAME_MS) / 1000;
    const capture = new AudioWorkletNode(mouth, "capture", { numberOfOutputs: 0, processorOptions: { samples: piece } });
    const playback = new AudioWorkletNode(ear, "playback", { numberOfInputs: 0, outputChannelCount: [1] });
    const level = new AnalyserNode(ear, { fftSize: 2048 });
    playback.connect(level).connect(ear.destination);

    const codebooks = root.querySelector("select").value;
    const place = new URL(`live?codebooks=${codebooks}&rate=${mouth.sampleRate}`, root.dataset.base || location.href);
    place.protocol = place.protocol.replace("http", "ws");
    const socket = new WebSocket(place);
    socket.binaryType = "arraybuffer";
    const sent = []; // when each piece left
    const spent = [];
    const trips = [];
    let received = 0; // frames
    let refused = "";
    const waiting = () => (sent.length * piece) / frame - received;

    capture.port.onmessage = ({ data }) => {
      if (socket.readyState !== WebSocket.OPEN) return;
      sent.push(performance.now());
      socket.send(data.buffer);
      if (waiting() > LATE) say("late", "It does not keep up: frames wait. Take fewer codebooks, or a faster machine.");
    };
    socket.onmessage = ({ data }) => {
      if (data instanceof ArrayBuffer) return playback.port.postMessage(new Int16Array(data));
      const facts = JSON.parse(data);
      if (facts.error) return void (refused = facts.error);
      received += facts.frames;
      trips.push(performance.now() - sent[Math.ceil((received * frame) / piece) - 1]); // the piece that ended the frame
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
      if (waiting() <= 2) say("on", "Speak. What you hear went through the codec.");
    };
    const ended = new Promise((resolve) => (socket.onclose = resolve));
    new MediaStreamAudioSourceNode(mouth, { mediaStream: media }).connect(capture);
    const stop = () => socket.close();
    ended.then(() => {
      media.getTracks().forEach((track) => track.stop());
      ear.close();
      mouth.close();
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
