import AppKit
import SwiftUI

@MainActor
final class Chat: ObservableObject {
    enum State { case starting, ready, answering, failed }

    @Published var state = State.starting
    @Published var answer = ""
    private let server = Server()
    private var task: Task<Void, Never>?

    func start() async {
        guard let resources = Bundle.main.resourceURL else { return }
        do {
            try await server.start(
                python: resources.appendingPathComponent("python/bin/python3"),
                model: resources.appendingPathComponent("model")
            )
            state = .ready
        } catch {
            answer = error.localizedDescription
            state = .failed
        }
    }

    func ask(_ question: String) {
        answer = ""
        state = .answering
        task = Task {
            do {
                for try await text in try await server.answer(to: question) { answer += text }
            } catch {
                if !Task.isCancelled { answer += "\n\(error.localizedDescription)" }
            }
            state = .ready
        }
    }

    func stopAnswer() {
        task?.cancel()
    }

    func stop() async {
        task?.cancel()
        await server.stop()
    }
}

struct ChatView: View {
    @ObservedObject var chat: Chat
    @State private var question = "Why is the sky blue?"

    var body: some View {
        VStack {
            HStack {
                TextField("Question", text: $question)
                    .onSubmit { if chat.state == .ready { chat.ask(question) } }
                switch chat.state {
                case .starting: ProgressView().controlSize(.small)
                case .ready: Button("Ask") { chat.ask(question) }
                case .answering: Button("Stop") { chat.stopAnswer() }
                case .failed: Image(systemName: "xmark.circle")
                }
            }
            ScrollView {
                Text(chat.answer).textSelection(.enabled).frame(maxWidth: .infinity, alignment: .leading)
            }
        }
        .padding()
        .frame(minWidth: 400, minHeight: 300)
    }
}

@MainActor
final class AppDelegate: NSObject, NSApplicationDelegate {
    let chat = Chat()

    func applicationDidFinishLaunching(_ notification: Notification) {
        Task { await chat.start() }
    }

    /// The server is a process of its own: nobody else ends it.
    func applicationShouldTerminate(_ sender: NSApplication) -> NSApplication.TerminateReply {
        Task {
            await chat.stop()
            sender.reply(toApplicationShouldTerminate: true)
        }
        return .terminateLater
    }
}

@main
struct ChatApp: App {
    @NSApplicationDelegateAdaptor(AppDelegate.self) private var delegate

    var body: some Scene {
        WindowGroup {
            ChatView(chat: delegate.chat)
        }
    }
}
